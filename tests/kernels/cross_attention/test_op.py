"""Cross-attention: every path against dense scores in float64, outputs and all gradients; documents, padding, wrong use."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.cross_attention import can_pair_documents, cross_attention, pair_documents
from spade_t5.layers.segments import SourceView

F64 = torch.float64


def inputs(batch: int, targets: int, sources: int, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, targets, 2, 8), (batch, sources, 2, 8), (batch, sources, 2, 8)]
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def output_and_gradients(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    o = cross_attention(*leaves, **options)
    o.backward(torch.randn(o.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(o.dtype))
    return [o.detach(), *(x.grad for x in leaves)]


def documents() -> tuple[Tensor, Tensor]:
    """Pads in front, inside and behind, one-token documents, a target without a source (4), a source without a target (3)."""
    targets = torch.tensor([[0, 1, 1, 2, 0, 2, 4], [1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
    sources = torch.tensor([[1, 2, 2, 0, 2, 3, 3, 3, 0], [0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 0]])
    return targets, sources


# Relative to each tensor's largest entry.
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("path", ["per document", "mask"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_equals_dense_scores(is_packed: bool, path: str, dtype: torch.dtype, tolerance: float) -> None:
    query_documents, key_documents = documents()
    tensors = inputs(3, 7, 9, dtype)
    ids = {"query_documents": query_documents if is_packed else None, "key_documents": key_documents}
    pairs = pair_documents(ids["query_documents"], key_documents, 7) if path == "per document" else None
    actual = output_and_gradients(tensors, **ids, pairs=pairs, backend="torch")
    exact = output_and_gradients([x.double() for x in tensors], **ids, backend="naive")
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()
    if is_packed:
        assert (actual[0][query_documents == 0] == 0).all()
        assert (actual[0][0, 6] == 0).all(), "a target without a source sees nothing"


def test_without_ids_every_key_is_seen() -> None:
    tensors = inputs(2, 3, 5)
    o = cross_attention(*tensors)
    weights = torch.einsum("bthk,blhk->bhtl", tensors[0], tensors[1]).softmax(dim=-1)
    torch.testing.assert_close(o, torch.einsum("bhtl,blhk->bthk", weights, tensors[2]))


def test_pairs_go_along_to_another_device() -> None:
    pairs = pair_documents(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), 2)
    view = SourceView(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), pairs).to(torch.device("meta"))
    assert view.pairs.queries_P.device.type == view.pairs.key_ends_N1.device.type == "meta"
    assert view.target_documents_BT.device.type == view.source_documents_BL.device.type == "meta"
    assert view.pairs.max_keys == 1


def test_many_short_documents_are_left_to_the_mask_on_a_cpu() -> None:
    few = torch.arange(2).repeat_interleave(256)[None] + 1
    many = torch.arange(128).repeat_interleave(4)[None] + 1
    assert pair_documents(few, few, 512).is_worth_while
    assert not pair_documents(many, many, 512).is_worth_while
    assert pair_documents(many, many, 512).num_scores == 128 * 16


def test_what_flash_attention_takes() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert can_pair_documents(torch.float32, 5, 0.1, cpu)
    assert not can_pair_documents(torch.float32, 64, 0.0, gpu)
    assert not can_pair_documents(torch.bfloat16, 64, 0.1, gpu)
    assert not can_pair_documents(torch.bfloat16, 20, 0.0, gpu)


def test_pairs_are_as_documented() -> None:
    pairs = pair_documents(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 2, 2, 0]]), 4)
    assert pairs.query_ends_N1.tolist() == [0, 2, 3]
    assert pairs.key_ends_N1.tolist() == [0, 1, 3]
    assert pairs.queries_P.tolist() == pairs.keys_S.tolist() == [0, 1, 2]
    assert (pairs.max_queries, pairs.max_keys) == (2, 2)


@pytest.mark.parametrize("ids", [(0, 0), (1, 0), (0, 1), (1, 2)])
def test_rows_without_any_pair_give_zeros_and_zero_gradients(ids: tuple[int, int]) -> None:
    query_documents, key_documents = torch.full((1, 2), ids[0]), torch.full((1, 3), ids[1])
    pairs = pair_documents(query_documents, key_documents, 2)
    options = {"query_documents": query_documents, "key_documents": key_documents, "pairs": pairs}
    for tensor in output_and_gradients(inputs(1, 2, 3), **options):
        assert (tensor == 0).all()


def test_dropout_keeps_the_expectation_on_both_paths() -> None:
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 64, 2, 8), torch.zeros(1, 64, 2, 8), torch.ones(1, 64, 2, 8)
    ids = torch.ones(1, 64, dtype=torch.int64)
    for pairs in (None, pair_documents(None, ids, 64)):
        o = cross_attention(q, k, v, key_documents=ids, pairs=pairs, dropout_p=0.25)
        assert o.std() > 0
        assert abs(o.mean() - 1.0) < 0.04


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"q has shape \(2, 3, 8\); expected a non-empty"),
        ({"k": torch.zeros(1, 5, 2, 8)}, r"k has shape \(1, 5, 2, 8\); expected \(2, sources, 2, 8\)"),
        ({"v": torch.zeros(2, 4, 2, 8)}, r"v has shape \(2, 4, 2, 8\); expected"),
        ({"v": torch.zeros(2, 5, 2, 8, dtype=F64)}, r"v is torch.float64 on cpu; it must be as q"),
        ({"key_documents": torch.ones(2, 4)}, r"key_documents has shape \(2, 4\); expected \(2, 5\)"),
        ({"query_documents": torch.ones(2, 3)}, r"key_documents is missing"),
        ({"dropout_p": -0.1}, r"dropout_p=-0.1 is outside"),
        ({"backend": "flash"}, r"backend='flash' is unknown"),
    ],
)
def test_wrong_use_is_refused(changes: dict[str, Any], message: str) -> None:
    right = {"q": torch.zeros(2, 3, 2, 8), "k": torch.zeros(2, 5, 2, 8), "v": torch.zeros(2, 5, 2, 8)}
    with pytest.raises(ValueError, match=message):
        cross_attention(**(right | changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_equals_dense_scores() -> None:
    query_documents, key_documents = (ids.repeat(1, 40).cumsum(1).clamp(max=3).cuda() for ids in documents())
    tensors = [x.cuda() for x in inputs(3, 280, 360, torch.bfloat16)]
    pairs = pair_documents(query_documents, key_documents, 280)
    ids = {"query_documents": query_documents, "key_documents": key_documents}
    actual = output_and_gradients(tensors, **ids, pairs=pairs)
    exact = output_and_gradients([x.double() for x in tensors], **ids, backend="naive")
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).norm() <= 1e-2 * e.norm()

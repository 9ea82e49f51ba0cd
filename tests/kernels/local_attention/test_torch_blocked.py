"""The blocked path against the dense reference: outputs, every gradient, and what must hold exactly."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.local_attention import local_attention

F64 = torch.float64
WINDOWS = [(0, 0), (1, 1), (127, 127), (1000, 1000), (70, 3), (None, 0), (0, None), (None, None)]


def inputs(
    batch: int, length: int, num_heads: int, d_kv: int, max_offset: int | None, dtype: torch.dtype = F64, seed: int = 0
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, length, num_heads, d_kv, generator=generator, dtype=F64).to(dtype)
    if max_offset is None:
        return [q, k, v, None]
    bias = torch.randn(num_heads, 2 * max_offset + 1, generator=generator, dtype=F64)
    return [q, k, v, bias.to(torch.promote_types(dtype, torch.float32))]


def packed_rows(batch: int, length: int) -> Tensor:
    """Rows with a pad in front, a document, a one-token document, another document and pads behind, all unaligned."""
    segment_ids = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        middle = length // 3 + row
        segment_ids[row, length // 9 : middle] = 1
        segment_ids[row, middle : middle + 1] = 2
        segment_ids[row, middle + 1 : length - length // 5] = 3
    return segment_ids


def output_and_gradients(tensors: list[Tensor | None], upstream: Tensor, **options: object) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    o = local_attention(*leaves, **options)  # type: ignore[arg-type]
    o.backward(upstream.to(o.dtype))
    return [o.detach(), *(x.grad for x in leaves if x is not None)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, e in zip(("o", "dq", "dk", "dv", "dbias"), actual, expected, strict=False):
        error = (a.double() - e.double()).abs().max()
        assert error <= tolerance * e.double().abs().max().clamp(min=1.0), (name, error.item())


@pytest.mark.parametrize(("left", "right"), WINDOWS)
@pytest.mark.parametrize("length", [1, 63, 500])
@pytest.mark.parametrize("is_packed", [False, True])
def test_equals_reference_in_float64(length: int, left: int | None, right: int | None, is_packed: bool) -> None:
    batch, num_heads, d_kv = 2, 2, 8
    tensors = inputs(batch, length, num_heads, d_kv, max_offset=40)
    upstream = torch.randn(batch, length, num_heads, d_kv, dtype=F64, generator=torch.Generator().manual_seed(9))
    segment_ids = packed_rows(batch, length) if is_packed else None
    options = {"left": left, "right": right, "segment_ids": segment_ids}
    expected = output_and_gradients(tensors, upstream, backend="naive", **options)
    actual = output_and_gradients(tensors, upstream, backend="torch", **options)
    assert_all_close(actual, expected, 1e-12)


@pytest.mark.parametrize("max_offset", [None, 0, 3, 600])
def test_bias_narrower_and_wider_than_the_window(max_offset: int | None) -> None:
    tensors = inputs(3, 200, 2, 8, max_offset)
    upstream = torch.randn(3, 200, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(9))
    for left, right in ((20, 150), (None, None)):
        expected = output_and_gradients(tensors, upstream, left=left, right=right, backend="naive")
        actual = output_and_gradients(tensors, upstream, left=left, right=right, backend="torch")
        assert_all_close(actual, expected, 1e-12)


# Relative to each tensor's largest entry; both paths compute in float32, bfloat16 and float16 round inputs and results.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    tensors = [None if x is None else 0.5 * x for x in inputs(2, 200, 2, 16, 30, dtype)]
    upstream = torch.randn(2, 200, 2, 16, generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = output_and_gradients([x.double() for x in tensors], upstream.double(), left=50, right=50, backend="naive")
    actual = output_and_gradients(tensors, upstream, left=50, right=50, backend="torch")
    assert actual[0].dtype == dtype
    assert actual[4].dtype == torch.float32
    assert_all_close(actual, exact, tolerance)


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(2, 70, 1, 2, 2)]
    segment_ids = torch.zeros(2, 70, dtype=torch.int64)
    segment_ids[0, 1:3], segment_ids[0, 3:69] = 1, 2
    segment_ids[1, :70] = 1

    def attention(*leaves: Tensor) -> Tensor:
        return local_attention(*leaves, left=3, right=2, segment_ids=segment_ids, backend="torch")

    assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)


def test_bias_gradient_sums_to_zero() -> None:
    """Adding one number to all biases of a head changes nothing, so the gradient has no component that way."""
    tensors = inputs(1, 300, 2, 16, 20)
    upstream = torch.randn(1, 300, 2, 16, dtype=F64, generator=torch.Generator().manual_seed(9))
    dbias = output_and_gradients(tensors, upstream, left=31, right=31)[4]
    assert dbias.abs().max() > 0.1
    assert dbias.sum(dim=1).abs().max() < 1e-11


@pytest.mark.parametrize(("left", "right"), [(31, 31), (None, 0), (None, None)])
def test_packed_row_equals_separate_documents(left: int | None, right: int | None) -> None:
    lengths = [37, 1, 150]
    tensors = inputs(1, sum(lengths) + 5, 2, 8, 10)
    upstream = torch.randn(1, sum(lengths) + 5, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(9))
    segment_ids = torch.tensor([[0, 0] + [1] * 37 + [2] + [0] + [3] * 150 + [0, 0]])
    starts = [2, 39, 41]

    packed = output_and_gradients(tensors, upstream, left=left, right=right, segment_ids=segment_ids)

    dbias = torch.zeros_like(packed[4])
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        alone = [x[:, part] for x in tensors[:3]] + [tensors[3]]
        separate = output_and_gradients(alone, upstream[:, part], left=left, right=right)
        assert_all_close([x[:, part] for x in packed[:4]], separate[:4], 1e-12)
        dbias += separate[4]
    assert_all_close([packed[4]], [dbias], 1e-12)
    is_padding = segment_ids[0] == 0
    assert all((x[0, is_padding] == 0).all() for x in packed[:4])


def test_row_of_padding_only_is_zero() -> None:
    tensors = inputs(2, 80, 2, 8, 4)
    segment_ids = torch.zeros(2, 80, dtype=torch.int64)
    segment_ids[1] = 1
    results = output_and_gradients(
        tensors, torch.ones(2, 80, 2, 8, dtype=F64), left=9, right=9, segment_ids=segment_ids
    )
    assert all((x[0] == 0).all() for x in results[:4])
    assert all(x.isfinite().all() for x in results)


def test_rows_do_not_depend_on_the_batch_around_them() -> None:
    tensors = inputs(5, 100, 2, 8, 10)
    together = local_attention(*tensors, left=20, right=20)
    for row in range(5):
        alone = local_attention(*(x[row : row + 1] for x in tensors[:3]), tensors[3], left=20, right=20)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-13)


def test_two_runs_are_bitwise_equal() -> None:
    tensors = inputs(2, 300, 2, 16, 20, torch.float32)
    upstream = torch.randn(2, 300, 2, 16, generator=torch.Generator().manual_seed(9))
    first = output_and_gradients(tensors, upstream, left=40, right=40)
    second = output_and_gradients(tensors, upstream, left=40, right=40)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_accepts_views_of_a_fused_projection() -> None:
    qkv = torch.randn(2, 90, 3, 2, 8, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(2, 2, 90, 8, dtype=F64, generator=torch.Generator().manual_seed(9)).transpose(1, 2)
    local_attention(*qkv.unbind(dim=2), None, left=10, right=10).backward(upstream)
    tensors = [x.contiguous() for x in qkv.detach().unbind(dim=2)]
    expected = output_and_gradients([*tensors, None], upstream, left=10, right=10)[1:]
    assert_all_close(list(qkv.grad.unbind(dim=2)), expected, 1e-13)


def test_autocast_does_not_reach_inside() -> None:
    tensors = inputs(1, 100, 2, 8, 10, torch.float32)
    upstream = torch.randn(1, 100, 2, 8, generator=torch.Generator().manual_seed(9))
    expected = output_and_gradients(tensors, upstream, left=20, right=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(tensors, upstream, left=20, right=20)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_dropout_gradient_uses_the_mask_of_the_forward_pass() -> None:
    """With the mask fixed, finite differences in float64 must agree with the backward pass."""
    tensors = [x.requires_grad_() for x in inputs(1, 70, 1, 2, 2)]

    def attention(*leaves: Tensor) -> Tensor:
        torch.manual_seed(7)
        return local_attention(*leaves, left=5, right=5, dropout_p=0.3, backend="torch")

    assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)


def test_dropout_follows_the_default_generator_and_keeps_the_expectation() -> None:
    q, k = torch.zeros(2, 1, 200, 1, 4)
    v = torch.ones(1, 200, 1, 4)
    torch.manual_seed(0)
    first, second = (local_attention(q, k, v, None, left=None, right=None, dropout_p=0.25) for _ in range(2))
    torch.manual_seed(0)
    again = local_attention(q, k, v, None, left=None, right=None, dropout_p=0.25)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # 200 x 200 independent weights of 1/200, each kept with probability 3/4: standard deviation of the mean is 0.003.
    assert abs(first.mean() - 1.0) < 0.012


def test_no_dropout_draws_nothing() -> None:
    tensors = inputs(1, 20, 1, 4, 2)
    torch.manual_seed(0)
    local_attention(*tensors, left=2, right=2)
    assert torch.initial_seed() == 0
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


def test_memory_saved_for_backward_is_the_inputs() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 500, 2, 8, 10)]
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        local_attention(*tensors, left=50, right=50)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert storages == {x.untyped_storage().data_ptr() for x in tensors}

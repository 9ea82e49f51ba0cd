"""Linear cross-entropy by chunks: loss and both gradients against all logits at once, at edges of chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spade_t5.kernels.linear_cross_entropy import (
    chunks,
    linear_cross_entropy,
    linear_cross_entropy_with_token_losses,
)
from spade_t5.testing.kernels import assert_near

F64 = torch.float64
TERMS = [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "label_smoothing": 0.2}]


def inputs(rows: int, d_model: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator, dtype=F64)
    weight = torch.randn(vocab_size, d_model, generator=generator, dtype=F64)
    labels = torch.randint(vocab_size, (rows,), generator=generator)
    labels[1::5] = -100
    return x, weight, labels


def run(x: Tensor, weight: Tensor, labels: Tensor, backend: str, **terms: float) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = linear_cross_entropy(*leaves, labels, backend=backend, **terms)
    (0.3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda vocab_size, device: 8)


def test_reference_equals_the_closed_form() -> None:
    x, weight = torch.tensor([[1.0], [5.0]]), torch.tensor([[0.0], [1.0]])
    lse = torch.tensor(1.0 + torch.e).log()
    expected = 0.9 * (lse - 1.0) + 0.1 * (lse - 0.5) + 0.5 * lse**2
    terms = {"z_loss": 0.5, "label_smoothing": 0.1}
    loss, token_losses = linear_cross_entropy_with_token_losses(
        x, weight, torch.tensor([1, -100]), **terms, backend="naive"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(token_losses, torch.stack([expected, torch.zeros(())]))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 7), (8, 33), (17, 33), (25, 2)])
def test_equals_reference_in_float64(rows: int, vocab_size: int, terms: dict[str, float], small_chunks: None) -> None:
    arguments = inputs(rows, 5, vocab_size)
    for actual, expected in zip(run(*arguments, "torch", **terms), run(*arguments, "naive", **terms), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, small_chunks: None) -> None:
    x, weight, labels = inputs(50, 64, 301)
    x, weight = (tensor.div(4).to(dtype) for tensor in (x, weight))
    actual = run(x, weight, labels, "torch", **TERMS[3])
    assert [tensor.dtype for tensor in actual] == [torch.float32, dtype, dtype]
    exact = run(x.double(), weight.double(), labels, "naive", **TERMS[3])
    assert_near("loss", actual[0], exact[0], bound=1e-5 if dtype == torch.float32 else 1e-3)
    assert_near("dx", actual[1], exact[1])
    assert_near("dweight", actual[2], exact[2])


def test_gradcheck_and_leading_dimensions(small_chunks: None) -> None:
    x, weight, labels = inputs(12, 3, 9)
    x = x.view(3, 4, 3).transpose(0, 1).detach().requires_grad_()
    labels = labels.view(3, 4).t()
    assert torch.autograd.gradcheck(
        lambda a, w: linear_cross_entropy(a, w, labels, **TERMS[3]), (x, weight.requires_grad_())
    )


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_token_losses_are_what_the_loss_sums(backend: str, small_chunks: None) -> None:
    x, weight, labels = inputs(24, 5, 33)
    x, labels = x.view(4, 6, 5).transpose(0, 1).requires_grad_(), labels.view(4, 6).t()
    loss, token_losses = linear_cross_entropy_with_token_losses(x, weight, labels, backend=backend, **TERMS[3])
    assert not token_losses.requires_grad
    alone = [
        linear_cross_entropy(x[i : i + 1, j], weight, labels[i : i + 1, j], backend="naive", **TERMS[3])
        for i in range(6)
        for j in range(4)
    ]
    torch.testing.assert_close(token_losses, torch.stack(alone).detach().view(6, 4), rtol=1e-12, atol=1e-12)
    assert (token_losses[labels == -100] == 0).all()
    assert torch.equal(loss, linear_cross_entropy(x, weight, labels, backend=backend, **TERMS[3]))
    (gradient,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels, backend=backend, **TERMS[3]), x)
    assert torch.equal(gradient, expected)


def test_token_losses_are_float32_under_autocast() -> None:
    x, weight, labels = inputs(6, 4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        _, token_losses = linear_cross_entropy_with_token_losses(x.bfloat16(), weight.float(), labels)
    assert token_losses.dtype == torch.float32


def test_all_labels_ignored_gives_zeros() -> None:
    x, weight, labels = inputs(6, 4, 9)
    for tensor in run(x.float(), weight.float(), torch.full_like(labels, -100), "torch", **TERMS[3]):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        products.append((len(a), len(b)))
        return F.linear(a, b)

    monkeypatch.setattr(chunks, "linear_onednn", product)
    x, weight, labels = inputs(6, 4, 9)
    linear_cross_entropy(x.requires_grad_(), weight, labels).backward()
    assert products == [(6, 9), (6, 4)]
    products.clear()
    linear_cross_entropy(x.detach(), weight.requires_grad_(), labels).backward()
    assert products == [(6, 9), (9, 4)]
    products.clear()
    with torch.no_grad():
        linear_cross_entropy(x, weight, labels)
    assert products == [(6, 9)]


def test_autocast_multiplies_in_its_dtype_and_keeps_float32() -> None:
    x, weight, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs(30, 16, 65))
    with torch.autocast("cpu", torch.bfloat16):
        results = {backend: run(x, weight, labels, backend, **TERMS[3]) for backend in ("torch", "naive")}
    exact = run(x.double(), weight.double(), labels, "naive", **TERMS[3])
    for i, name in enumerate(("loss", "dx", "dweight")):
        assert results["torch"][i].dtype == torch.float32
        assert_near(name, results["torch"][i], exact[i], bound=1e-2)
        error, naive_error = ((results[backend][i] - exact[i]).norm() for backend in ("torch", "naive"))
        assert error <= 2.0 * naive_error + 1e-3


def test_compiles_as_one_graph() -> None:
    x, weight, labels = inputs(6, 4, 9)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x.requires_grad_(), weight, labels), linear_cross_entropy(x.requires_grad_(), weight, labels)
    )


def test_chunks_depend_on_the_vocabulary_only() -> None:
    assert chunks.rows_per_chunk(32128, torch.device("cuda")) == 4096
    assert chunks.rows_per_chunk(32128, torch.device("cpu")) >= 128
    assert chunks.rows_per_chunk(1 << 28, torch.device("cpu")) == 1


def test_wrong_use_is_refused() -> None:
    x, weight, labels = inputs(6, 4, 9)
    with pytest.raises(ValueError, match=r"x is torch.int64 of shape \(6, 4\); expected a non-empty floating tensor"):
        linear_cross_entropy(x.long(), weight, labels)
    with pytest.raises(ValueError, match=r"x is torch.float64 of shape \(0, 4\); expected a non-empty"):
        linear_cross_entropy(x[:0], weight, labels[:0])
    with pytest.raises(ValueError, match=r"weight has shape \(4, 9\); expected \(vocab_size, 4\)"):
        linear_cross_entropy(x, weight.t(), labels)
    with pytest.raises(ValueError, match=r"labels has shape \(5,\); expected \(6,\)"):
        linear_cross_entropy(x, weight, labels[:5])
    with pytest.raises(ValueError, match=r"labels is torch.float32; expected integers"):
        linear_cross_entropy(x, weight, labels.float())
    with pytest.raises(ValueError, match=r"labels holds 9; expected \[0, 9\) or ignore_index=-100"):
        linear_cross_entropy(x, weight, torch.full_like(labels, 9))
    with pytest.raises(ValueError, match=r"labels holds -1; expected \[0, 9\)"):
        linear_cross_entropy(x, weight, torch.full_like(labels, -1))
    with pytest.raises(ValueError, match=r"weight is torch.float32 and x is torch.float64; cast one"):
        linear_cross_entropy(x, weight.float(), labels)
    with pytest.raises(ValueError, match=r"z_loss=-1.0 is negative"):
        linear_cross_entropy(x, weight, labels, z_loss=-1.0)
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 is not in \[0, 1\]"):
        linear_cross_entropy(x, weight, labels, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"weight is on meta and labels on cpu; move both to cpu"):
        linear_cross_entropy(x, weight.to("meta"), labels)

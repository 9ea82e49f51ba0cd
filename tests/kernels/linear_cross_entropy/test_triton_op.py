"""Linear cross-entropy by Triton against all logits at once in float64: loss and both gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spade_t5.kernels.linear_cross_entropy import (
    chunks,
    linear_cross_entropy,
    linear_cross_entropy_with_token_losses,
)
from spade_t5.testing.kernels import assert_near, poisoned_allocations

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TERMS = {"z_loss": 1e-2, "label_smoothing": 0.2}


def inputs(rows: int, d_model: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator, dtype=F64)
    weight = torch.randn(vocab_size, d_model, generator=generator, dtype=F64) * 2 / d_model**0.5
    labels = torch.randint(vocab_size, (rows,), generator=generator)
    labels[1::5] = -100
    return x.to(dtype), weight.to(dtype), labels


def run(x: Tensor, weight: Tensor, labels: Tensor, backend: str, **terms: float) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    with poisoned_allocations():
        loss = linear_cross_entropy(*leaves, labels, backend=backend, **terms)
        (0.3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "rows_per_chunk", lambda vocab_size, device: 16)


def assert_equals_reference(arguments: tuple[Tensor, Tensor, Tensor], **terms: float) -> None:
    x, weight, labels = arguments
    actual = run(x, weight, labels, "triton", **terms)
    assert [tensor.dtype for tensor in actual] == [F32, x.dtype, x.dtype]
    exact = run(x.double(), weight.double(), labels, "naive", **terms)
    # The loss is float32, of logits in the dtype of x.
    assert_near("loss", actual[0], exact[0], bound={F32: 1e-5, F16: 1e-3, BF16: 1e-2}[x.dtype])
    assert_near("dx", actual[1], exact[1])
    assert_near("dweight", actual[2], exact[2])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("terms", [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, TERMS])
def test_equals_reference_by_terms(terms: dict[str, float], dtype: torch.dtype, small_chunks: None) -> None:
    assert_equals_reference(inputs(40, 24, 101, dtype), **terms)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 64), (17, 63), (63, 65), (65, 129), (127, 2), (16, 200)])
def test_equals_reference_by_shape(rows: int, vocab_size: int, dtype: torch.dtype, small_chunks: None) -> None:
    assert_equals_reference(inputs(rows, 16, vocab_size, dtype), **TERMS)


def test_half_precision_errs_no_more_than_eager_pytorch(small_chunks: None) -> None:
    x, weight, labels = inputs(50, 32, 301, BF16)
    exact = run(x.double(), weight.double(), labels, "naive", **TERMS)
    ours, eager = (run(x, weight, labels, backend, **TERMS) for backend in ("triton", "naive"))
    for one, other, truth in zip(ours, eager, exact, strict=True):
        # Stores of the interpreter truncate bfloat16, which errs twice as much as rounding.
        assert (one - truth).norm() <= 2.0 * 2.0 * (other - truth).norm() + 1e-6


def test_two_runs_are_bitwise_equal_and_strides_do_not_matter(small_chunks: None) -> None:
    x, weight, labels = inputs(40, 24, 65, F32)
    expected = run(x, weight, labels, "triton", **TERMS)
    layouts = [
        (x, weight, labels),
        (x.t().contiguous().t(), weight.t().contiguous().t(), labels.repeat_interleave(2)[::2]),
        (torch.cat([x, x], 1)[:, :24], torch.cat([weight, weight], 1)[:, 24:], labels.int()),
    ]
    for layout in layouts:
        for one, again in zip(run(*layout, "triton", **TERMS), expected, strict=True):
            torch.testing.assert_close(one, again, rtol=1e-6, atol=1e-6)
    for one, again in zip(run(x, weight, labels, "triton", **TERMS), expected, strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_token_losses_are_what_the_loss_sums(dtype: torch.dtype, small_chunks: None) -> None:
    x, weight, labels = inputs(40, 24, 101, dtype)
    x, labels = x.view(8, 5, 24).transpose(0, 1).requires_grad_(), labels.view(8, 5).t()
    with poisoned_allocations():
        loss, token_losses = linear_cross_entropy_with_token_losses(x, weight, labels, backend="triton", **TERMS)
    _, exact = linear_cross_entropy_with_token_losses(x.double(), weight.double(), labels, backend="naive", **TERMS)
    assert token_losses.dtype == F32
    assert not token_losses.requires_grad
    assert_near("token losses", token_losses, exact, bound={F32: 1e-5, BF16: 1e-2}[dtype])
    assert (token_losses[labels == -100] == 0).all()
    torch.testing.assert_close(token_losses.sum(), loss.detach())
    assert torch.autograd.grad(loss, x)[0].any()


def test_ignored_rows_have_no_gradient() -> None:
    x, weight, labels = inputs(20, 8, 33, F32)
    assert (run(x, weight, labels, "triton", **TERMS)[1][labels == -100] == 0).all()
    for tensor in run(x, weight, torch.full_like(labels, -100), "triton", **TERMS):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_label_outside_of_the_vocabulary_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_t5.kernels.linear_cross_entropy.op._check_range", lambda *arguments: None)
    x, weight, labels = inputs(6, 8, 33, F32)
    for label in (33, -1):
        labels[3] = label
        assert linear_cross_entropy(x, weight, labels, backend="triton").isnan()


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_frozen_sides_get_none(frozen: str) -> None:
    x, weight, labels = inputs(20, 8, 33, F32)
    expected = run(x, weight, labels, "naive")
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    loss = linear_cross_entropy(x, weight, labels, backend="triton")
    torch.testing.assert_close(loss.detach(), expected[0])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        (0.3 * loss).backward()
        trained, gradient = (weight, expected[2]) if frozen == "x" else (x, expected[1])
        torch.testing.assert_close(trained.grad, gradient)


def test_operator_passes_pytorchs_own_checks_and_is_one_node_of_a_compiled_graph() -> None:
    x, weight, labels = inputs(9, 8, 33, F32)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(
        torch.ops.spade_t5.linear_cross_entropy,
        (*leaves, labels, 1e-2, 0.1, -100, F32, True, True),
        # The gradients are results too, but only the loss has a gradient of its own.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )

    def function(x: Tensor, weight: Tensor) -> Tensor:
        loss, token_losses = linear_cross_entropy_with_token_losses(x, weight, labels, backend="triton", **TERMS)
        return loss + token_losses.sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves), strict=True
    ):
        assert torch.equal(one, other)


def test_checkpointing_and_no_grad() -> None:
    x, weight, labels = inputs(9, 8, 33, F32)
    leaves = (x.requires_grad_(), weight.requires_grad_())

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, backend="triton", **TERMS)

    plain = torch.autograd.grad(function(*leaves), leaves)
    for use_reentrant in (False, True):
        x.grad = weight.grad = None
        checkpoint(function, *leaves, use_reentrant=use_reentrant).backward()
        assert torch.equal(x.grad, plain[0])
        assert torch.equal(weight.grad, plain[1])
    with torch.no_grad():
        assert torch.equal(function(*leaves), function(*leaves))


def test_autocast_multiplies_in_its_dtype_and_keeps_float32(small_chunks: None) -> None:
    x, weight, labels = inputs(60, 32, 65, F32)
    with torch.autocast("cpu", BF16):
        actual = run(x, weight, labels, "triton", **TERMS)
    exact = run(x.double(), weight.double(), labels, "naive", **TERMS)
    for name, one, other in zip(("loss", "dx", "dweight"), actual, exact, strict=True):
        assert one.dtype == F32
        assert_near(name, one, other, bound=1e-2)


def test_refuses_float64() -> None:
    x, weight, labels = inputs(4, 8, 9, F64)
    with pytest.raises(ValueError, match=r"x is float64: the Triton kernels take float32"):
        linear_cross_entropy(x, weight, labels, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_sizes() -> None:
    x, weight, labels = (tensor.cuda() for tensor in inputs(9001, 768, 32128, BF16))
    actual = run(x, weight, labels, "triton", **TERMS)
    exact = run(x.float(), weight.float(), labels, "naive", **TERMS)
    for name, one, other in zip(("loss", "dx", "dweight"), actual, exact, strict=True):
        assert_near(name, one, other, bound=1e-2)
    again = run(x, weight, labels, "triton", **TERMS)
    assert all(torch.equal(one, other) for one, other in zip(actual, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_loss_scale_beyond_float16_stays_finite(backend: str) -> None:
    x, weight, labels = (tensor.cuda() for tensor in inputs(33, 64, 500, torch.float16))
    leaves = [1e-3 * tensor for tensor in (x, weight)]
    found = []
    for dtype in (torch.float16, F32):
        scaled = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        (linear_cross_entropy(*scaled, labels, backend=backend) * 65536.0).backward()
        found.append([leaf.grad for leaf in scaled])
    for half, single in zip(*found, strict=True):
        assert_near("gradient", half, single, bound=5e-2)

"""The oneDNN path against PyTorch's linear: output, every gradient, and when it steps aside."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.linear import linear
from spade_t5.kernels.linear.torch_onednn import _serves

F64 = torch.float64


def run(tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y = linear(*leaves, backend=backend)  # type: ignore[arg-type]
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


def inputs(*shape: int, out_features: int, bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    weight = torch.randn(out_features, shape[-1], generator=generator, dtype=F64).to(dtype)
    return [x, weight, torch.randn(out_features, generator=generator, dtype=F64).to(dtype) if bias else None]


# Relative to each tensor's largest entry: sums of up to 500 float32 products, in another order than the reference's.
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 40), (500, 24), (17, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64(shape: tuple[int, ...], bias: bool) -> None:
    tensors = inputs(*shape, out_features=33, bias=bias)
    exact = run([None if x is None else x.double() for x in tensors], "naive")
    for actual, expected in zip(run(tensors, "torch"), exact, strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_takes_strided_tensors() -> None:
    x, weight, _ = inputs(6, 20, 24, out_features=8, bias=False)
    strided = [x.transpose(0, 1), weight[:, ::2].repeat_interleave(2, dim=1).t().contiguous().t(), None]
    dense = [None if t is None else t.contiguous() for t in strided]
    for actual, expected in zip(run(strided, "torch"), run(dense, "naive"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_two_runs_are_bitwise_equal() -> None:
    tensors = inputs(4, 100, 64, out_features=48, bias=True)
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, "torch"), run(tensors, "torch"), strict=True))


def test_steps_aside_for_other_dtypes_few_rows_and_autocast() -> None:
    x, weight, _ = inputs(64, 8, out_features=4, bias=False)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    assert _serves(x, weight)
    assert not _serves(x[:15], weight)
    assert not _serves(x.double(), weight.double())
    assert not _serves(x.bfloat16(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _serves(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


def test_gradcheck_of_the_other_dtypes() -> None:
    tensors = [t.requires_grad_() for t in inputs(3, 5, 4, out_features=2, bias=True, dtype=F64)]
    assert torch.autograd.gradcheck(linear, tensors)


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight, _ = inputs(64, 8, out_features=4, bias=False)
    x.requires_grad_()
    linear(x, weight).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(64, 8))


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \(4, 7\); x of shape \(2, 8\) needs \(out, 8\)"):
        linear(torch.ones(2, 8), torch.ones(4, 7))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(4,\)"):
        linear(torch.ones(2, 8), torch.ones(4, 8), torch.ones(3))

"""RMS norm: the written-out gradient against autograd, and T5's order of casts."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.rms_norm import rms_norm

F64 = torch.float64


def run(x: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = rms_norm(*leaves, 1e-6, backend=backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=F64) * 3
    return x, torch.randn(shape[-1], generator=generator, dtype=F64)


def test_reference_equals_the_closed_form() -> None:
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0, backend="naive")
    rms = (25.0 / 2.0) ** 0.5
    torch.testing.assert_close(y, torch.tensor([[3.0 / rms, 8.0 / rms]]))


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 17), (600, 512), (5,)])
def test_equals_reference_in_float64(shape: tuple[int, ...]) -> None:
    x, weight = inputs(*shape)
    for actual, expected in zip(run(x, weight, "torch"), run(x, weight, "naive"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# float32 differs by the order of sums; bfloat16 keeps 8 bits, and the weight's gradient sums 200 rounded terms.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    x, weight = (tensor.to(dtype) for tensor in inputs(2, 100, 32))
    for actual, exact in zip(run(x, weight, "torch"), run(x.double(), weight.double(), "naive"), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_bfloat16_rounds_as_t5_does() -> None:
    x, weight = (tensor.to(torch.bfloat16) for tensor in inputs(4, 32))
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), weight * normalised.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_float32_weight_keeps_the_dtype_of_the_input(backend: str) -> None:
    x, weight = inputs(4, 32)
    assert rms_norm(x.to(torch.bfloat16), weight.float(), 1e-6, backend=backend).dtype == torch.bfloat16


def test_gradcheck_and_non_contiguous_input() -> None:
    x, weight = inputs(6, 3, 5)
    strided = x.transpose(0, 1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: rms_norm(a, w, 1e-3), (strided, weight.requires_grad_()))


def test_wrong_use_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); expected \(4,\)"):
        rms_norm(x, torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match=r"eps=-1.0 is negative"):
        rms_norm(x, torch.ones(4), -1.0)
    with pytest.raises(ValueError, match=r"x is torch.int64 of shape \(2, 4\)"):
        rms_norm(x.long(), torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match=r"weight is on meta; move it to cpu"):
        rms_norm(x, torch.ones(4, device="meta"), 1e-6)

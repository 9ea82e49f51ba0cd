"""Gated GELU: output and written-out gradient against the formula."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.gated_gelu import gated_gelu

F64 = torch.float64


def run(a: Tensor, b: Tensor, backend: str) -> list[Tensor]:
    leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    h = gated_gelu(*leaves, backend=backend)
    h.backward(torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(h.dtype))
    return [h.detach(), *(leaf.grad for leaf in leaves)]


# Relative to each tensor's largest entry. bfloat16 rounds gelu(a) once more before the product.
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1,), (2, 63, 5), (500, 3), (600, 512)])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    for actual, exact in zip(run(a, b, "torch"), run(a.double(), b.double(), "naive"), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_takes_the_two_halves_of_one_projection() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    a, b = x.chunk(2, dim=-1)
    assert torch.equal(gated_gelu(a, b), gated_gelu(a.contiguous(), b.contiguous()))


def test_wrong_use_is_refused() -> None:
    a = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"b has shape \(2, 3\); it must equal that of a, \(2, 4\)"):
        gated_gelu(a, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"b is torch.float64 on cpu; it must be as a"):
        gated_gelu(a, a.double())
    with pytest.raises(ValueError, match=r"a is torch.int64 of shape"):
        gated_gelu(a.long(), a.long())

"""Gated GELU by Triton against the formula in float64: output, both gradients, strides, compilation."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.gated_gelu import gated_gelu
from spade_t5.testing.kernels import assert_near, poisoned_allocations

F64 = torch.float64


def run(a: Tensor, b: Tensor, backend: str) -> list[Tensor]:
    leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    with poisoned_allocations():
        h = gated_gelu(*leaves, backend=backend)
        h.backward(torch.randn(h.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(h.dtype))
    return [h.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 63, 5), (7, 64), (3, 2, 130)])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    for name, actual, exact in zip(
        ("h", "da", "db"), run(a, b, "triton"), run(a.double(), b.double(), "naive"), strict=True
    ):
        assert actual.dtype == dtype
        assert_near(name, actual, exact)


def test_takes_halves_of_one_projection_and_transposed_tensors() -> None:
    x = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    for a, b in (x.chunk(2, dim=-1), x.transpose(1, 2).chunk(2, dim=-2)):
        for actual, expected in zip(run(a, b, "triton"), run(a.contiguous(), b.contiguous(), "triton"), strict=True):
            assert torch.equal(actual, expected)


def test_is_one_node_of_a_compiled_graph() -> None:
    a, b = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda a, b: gated_gelu(a, b, backend="triton"), backend="aot_eager", fullgraph=True)
    torch.library.opcheck(torch.ops.spade_t5.gated_gelu, (a.requires_grad_(), b.requires_grad_()))
    assert torch.equal(compiled(a, b), gated_gelu(a, b, backend="triton"))


def test_refuses_float64() -> None:
    a = torch.ones(2, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"a is float64: the Triton kernels take float32, .* choose backend 'torch'"):
        gated_gelu(a, a, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_sizes_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(8192, 2 * 2048, generator=generator).cuda().to(torch.bfloat16)).chunk(2, dim=-1)
    dh = torch.randn(8192, 2048, generator=generator).cuda().to(torch.bfloat16)
    found = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "naive")):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (a, b)]
        h = gated_gelu(*leaves, backend=backend)
        h.backward(dh.to(dtype))
        found.append([h.detach(), *(leaf.grad for leaf in leaves)])
    for name, actual, exact in zip(("h", "da", "db"), *found, strict=True):
        assert_near(name, actual, exact)

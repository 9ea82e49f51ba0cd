"""The references are what everything else is measured by: their own gradients against finite differences, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.cross_attention import cross_attention
from spade_t5.kernels.gated_gelu import gated_gelu
from spade_t5.kernels.linear import linear
from spade_t5.kernels.linear_cross_entropy import linear_cross_entropy
from spade_t5.kernels.local_attention import local_attention
from spade_t5.kernels.rms_norm import add_rms_norm, rms_norm
from spade_t5.kernels.ssm_conv import ssm_conv

SEGMENTS = torch.tensor([[0, 1, 1, 2, 0, 2, 3]])
LABELS = torch.tensor([3, -100, 0])
CASES: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[tuple[int, ...]]]] = {
    "local_attention": (
        lambda q, k, v, bias: local_attention(q, k, v, bias, left=2, right=1, segment_ids=SEGMENTS, backend="naive"),
        [(1, 7, 2, 3)] * 3 + [(2, 3)],
    ),
    "cross_attention": (
        lambda q, k, v: cross_attention(
            q, k, v, query_documents=SEGMENTS[:, :4], key_documents=SEGMENTS, backend="naive"
        ),
        [(1, 4, 2, 3), (1, 7, 2, 3), (1, 7, 2, 3)],
    ),
    "ssm_conv": (
        lambda u, kernel, skip: ssm_conv(u, kernel, skip, segment_ids=SEGMENTS, backend="naive"),
        [(1, 7, 2), (2, 2, 7), (2,)],
    ),
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-3, backend="naive"), [(3, 5), (5,)]),
    "add_rms_norm": (
        lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-3, backend="naive"),
        [(3, 5), (3, 5), (5,)],
    ),
    "gated_gelu": (lambda a, b: gated_gelu(a, b, backend="naive"), [(3, 5), (3, 5)]),
    "linear": (lambda x, weight, bias: linear(x, weight, bias, backend="naive"), [(3, 4), (5, 4), (5,)]),
    "linear_cross_entropy": (
        lambda x, weight: linear_cross_entropy(x, weight, LABELS, z_loss=0.1, label_smoothing=0.2, backend="naive"),
        [(3, 4), (5, 4)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(function, tensors)

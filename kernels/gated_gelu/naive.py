"""Gated GELU by its formula, in float32 at least: the reference for every other backend."""

import math

import torch
from torch import Tensor


def gated_gelu_naive(a: Tensor, b: Tensor) -> Tensor:
    """H = gelu_tanh(a) * b; arguments and result as of `gated_gelu`, unchecked."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a_float, b_float = a.to(dtype), b.to(dtype)
    tanh = torch.tanh(math.sqrt(2.0 / math.pi) * (a_float + 0.044715 * a_float.pow(3)))
    return (0.5 * a_float * (1.0 + tanh) * b_float).to(a.dtype)

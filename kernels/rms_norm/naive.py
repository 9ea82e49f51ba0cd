"""RMS norm as T5 writes it, differentiated by autograd: the reference for every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Y = weight * (x * rsqrt(mean(x^2) + eps)); arguments and result as of `rms_norm`, unchecked."""
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = x_float * torch.rsqrt(x_float.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype)


def add_rms_norm_naive(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """R = residual + dropout(x) and its norm; arguments and results as of `add_rms_norm`, unchecked."""
    r = residual + F.dropout(x, dropout_p)
    return r, rms_norm_naive(r, weight, eps)

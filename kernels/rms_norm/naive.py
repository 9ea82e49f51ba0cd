"""RMS norm as T5 writes it, differentiated by autograd: the reference for every other backend."""

import torch
from torch import Tensor


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Y = weight * (x * rsqrt(mean(x^2) + eps)); arguments and result as of `rms_norm`, unchecked."""
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = x_float * torch.rsqrt(x_float.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (weight * normalised.to(x.dtype)).to(x.dtype)

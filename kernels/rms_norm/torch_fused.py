"""RMS norm in plain PyTorch with its gradient written out.

Autograd of the eager chain passes over the (B, L, D) tensor a dozen times and keeps two of them; here the forward pass
makes three passes, the backward pass six, and only the input is kept, beside one number per vector.

Shapes: X vectors, D their length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Y = weight * (x * rsqrt(mean(x^2) + eps)); arguments and result as of `rms_norm`, unchecked."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_XD = x.reshape(-1, x.shape[-1])
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm_X1 = torch.linalg.vector_norm(x_XD, dim=-1, keepdim=True, dtype=dtype)
        scale_X1 = norm_X1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale_X1)
        return (x_XD * scale_X1).to(x.dtype).mul_(weight_D).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale_X1 = ctx.saved_tensors
        dy_XD, n_XD = dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]) * scale_X1
        dweight_D = dx = None
        if ctx.needs_input_grad[1]:
            dweight_D = torch.linalg.vecdot(dy_XD.to(n_XD.dtype), n_XD, dim=0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            g_XD = dy_XD * weight_D.to(n_XD.dtype)
            mean_X1 = torch.linalg.vecdot(g_XD, n_XD, dim=-1)[:, None].div_(x.shape[-1])
            dx = g_XD.addcmul_(n_XD, mean_X1, value=-1.0).mul_(scale_X1).to(x.dtype).view(x.shape)
        return dx, dweight_D, None

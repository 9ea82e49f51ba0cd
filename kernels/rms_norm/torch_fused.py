"""RMS norm in plain PyTorch with its gradient written out.

Autograd of the eager chain makes and passes over a dozen tensors of the input's size and keeps two of them; here the
results are the only ones, and what is kept is the input and one number per vector.

Shapes: X vectors, D their length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spade_t5.kernels.row_steps import row_steps


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return y = weight * (x * rsqrt(mean(x^2) + eps)); arguments and result as of `rms_norm`, unchecked."""
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm_fused(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """R = residual + dropout(x) and its norm; arguments and results as of `add_rms_norm`, unchecked."""
    r = residual + (F.dropout(x, dropout_p) if dropout_p else x)
    return r, rms_norm_fused(r, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_XD = x.reshape(-1, x.shape[-1])
        norm_X1 = torch.linalg.vector_norm(
            x_XD, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        scale_X1 = norm_X1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale_X1)
        y_XD = torch.empty_like(x_XD, memory_format=torch.contiguous_format)
        for rows in row_steps(x_XD):
            torch.mul(x_XD[rows], scale_X1[rows], out=y_XD[rows]).mul_(weight_D)
        return y_XD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale_X1 = ctx.saved_tensors
        x_XD, dy_XD = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1])
        weight_float_D = weight_D.to(scale_X1.dtype)
        dx_XD = torch.empty_like(x_XD, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        dweight_D = torch.zeros_like(weight_float_D) if ctx.needs_input_grad[1] else None
        for rows in row_steps(x_XD):
            n_XD, g_XD = x_XD[rows] * scale_X1[rows], dy_XD[rows].to(scale_X1.dtype)
            if dweight_D is not None:
                dweight_D += (g_XD * n_XD).sum(dim=0)
            if dx_XD is not None:
                g_XD = g_XD * weight_float_D
                mean_X1 = torch.linalg.vecdot(g_XD, n_XD, dim=-1)[:, None].div_(x.shape[-1])
                dx_XD[rows] = g_XD.addcmul_(n_XD, mean_X1, value=-1.0).mul_(scale_X1[rows])
        dx = None if dx_XD is None else dx_XD.view(x.shape)
        return dx, None if dweight_D is None else dweight_D.to(weight_D.dtype), None

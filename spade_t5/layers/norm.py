"""Normalisation: T5's RMSNorm, and the choice between it and LayerNorm.

Both also take the residual sum before them, `norm(x, residual, dropout_p)`, which a GPU does in the same pass over memory.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from spade_t5.ops import add_rms_norm, rms_norm, rms_norm_with_transpose


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), statistics in fp32, no mean and no bias (arXiv:1910.07467)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Parameter(torch.empty(d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as a pure normalisation."""
        nn.init.ones_(self.weight)

    @overload
    def forward(self, x_BLD: Tensor) -> Tensor: ...

    @overload
    def forward(self, x_BLD: Tensor, residual_BLD: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x_BLD: Tensor, residual_BLD: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalises the last dimension of `x_BLD`; given a residual, of r = residual + dropout(x), and returns (r, y)."""
        if residual_BLD is None:
            return rms_norm(x_BLD, self.weight, self.eps)
        return add_rms_norm(x_BLD, residual_BLD, self.weight, self.eps, dropout_p=dropout_p)


class TransposingRMSNorm(RMSNorm):
    """RMSNorm whose result comes twice: as it is, and laid out for the SSM convolution."""

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Both hold the same numbers, (B, L, D)."""
        return rms_norm_with_transpose(x_BLD, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Mean and variance, weight and bias, with the calls of `RMSNorm`."""

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual_BLD: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, residual_BLD: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `RMSNorm.forward`."""
        if residual_BLD is None:
            return super().forward(input)
        sum_BLD = residual_BLD + F.dropout(input, dropout_p)
        return sum_BLD, super().forward(sum_BLD)


def make_norm(norm_type: str, d_model: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm that `LayersConfig.norm_type` names."""
    return RMSNorm(d_model, eps) if norm_type == "rms" else LayerNorm(d_model, eps=eps)

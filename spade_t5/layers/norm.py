"""Normalisation: T5's RMSNorm, and the choice between it and LayerNorm."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from spade_t5.ops import rms_norm


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

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalises the last dimension; shape and dtype stay."""
        return rms_norm(x_BLD, self.weight, self.eps)


def make_norm(norm_type: str, d_model: int, eps: float) -> nn.Module:
    """The norm that `LayersConfig.norm_type` names."""
    return RMSNorm(d_model, eps) if norm_type == "rms" else nn.LayerNorm(d_model, eps=eps)

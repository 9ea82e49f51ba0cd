"""FLOPs as PyTorch's own counter sees them, taught the operators that it does not know."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_Shape = tuple[int, ...]


def torch_flops(run: Callable[[], Any]) -> int:
    """FLOPs of all that a function multiplies, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        run()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten.baddbmm_: _batched_sum,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._fft_r2c: _transform,
        aten._fft_c2r: _inverse_transform,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear
    return formulas


def _linear(x: _Shape, weight: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _batched_sum(_sum: _Shape, a: _Shape, b: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(a) * b[2]


def _attention(q: _Shape, k: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 4 * math.prod(q) * k[2]


def _attention_backward(_do: _Shape, q: _Shape, k: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """With the scores computed again, as PyTorch counts it for the attention of GPUs."""
    return 10 * math.prod(q) * k[2]


def _transform(x: _Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return round(2.5 * math.prod(x) * math.log2(x[-1]))


def _inverse_transform(_x: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    return round(2.5 * math.prod(out_shape) * math.log2(out_shape[-1]))

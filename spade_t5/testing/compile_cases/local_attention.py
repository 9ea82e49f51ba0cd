"""Local attention, forward and backward: head sizes, window classes, dtypes, packed rows, dropout, with and without bias."""

from collections.abc import Callable
from functools import partial

import torch

from spade_t5.kernels.local_attention.triton_op import HEAD_SIZES, local_attention_triton

_WINDOWS: dict[str, tuple[int | None, int | None]] = {
    "narrow": (127, 127),
    "wide": (511, 511),
    "causal": (None, 0),
    "full": (None, None),
}


def _call(
    d_kv: int = 64,
    window: str = "narrow",
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_bias: bool = True,
    is_packed: bool = False,
    dropout_p: float = 0.0,
    length: int = 1024,
    num_heads: int = 2,
    max_offset: int = 128,
) -> None:
    qkv = torch.zeros(1, length, 3, num_heads, d_kv, dtype=dtype, requires_grad=True)
    offset_bias = torch.zeros(num_heads, 2 * max_offset + 1, requires_grad=True) if has_bias else None
    segment_ids = torch.ones(1, length, dtype=torch.int64) if is_packed else None
    left, right = _WINDOWS[window]
    q, k, v = qkv.unbind(2)
    o = local_attention_triton(q, k, v, offset_bias, left, right, segment_ids, dropout_p)
    o.backward(torch.zeros_like(o))


def _hardest(d_kv: int, window: str, dtype: torch.dtype) -> None:
    """Packed rows that end inside a tile, with dropout: what takes most registers."""
    _call(d_kv, window, dtype, is_packed=True, dropout_p=0.1, length=1000)


CASES: dict[str, Callable[[], None]] = {
    # One head, one tile: arguments of 1 become constants of the kernel.
    "d64/narrow/bfloat16/smallest": lambda: _call(length=64, num_heads=1),
    "d64/narrow/bfloat16/ragged": lambda: _call(length=1000),
    "d64/narrow/bfloat16/packed": lambda: _call(is_packed=True),
    "d64/narrow/bfloat16/no bias": lambda: _call(has_bias=False),
    "d64/narrow/bfloat16/dropout": lambda: _call(dropout_p=0.1),
    "d64/wide/bfloat16/many biases": lambda: _call(window="wide", max_offset=511),
    "d64/narrow/float16/packed": lambda: _call(dtype=torch.float16, is_packed=True),
}
for _d_kv in HEAD_SIZES:
    for _window in _WINDOWS:
        _name = f"d{_d_kv}/{_window}"
        CASES[f"{_name}/bfloat16"] = partial(_call, _d_kv, _window)
        CASES[f"{_name}/bfloat16/packed/ragged"] = partial(_call, _d_kv, _window, is_packed=True, length=1000)
        CASES[f"{_name}/bfloat16/hardest"] = partial(_hardest, _d_kv, _window, torch.bfloat16)
        CASES[f"{_name}/float32/hardest"] = partial(_hardest, _d_kv, _window, torch.float32)

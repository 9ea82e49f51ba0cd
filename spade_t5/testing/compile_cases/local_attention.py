"""Local attention, forward and backward: head sizes, window classes, dtypes, packed rows, dropout, with and without bias."""

from collections.abc import Callable

import torch

from spade_t5.kernels.local_attention.triton_op import HEAD_SIZES, local_attention_triton

_WINDOWS: dict[str, tuple[int | None, int | None]] = {
    "narrow": (127, 127),
    "wide": (511, 511),
    "causal": (None, 0),
    "full": (None, None),
}
_LENGTH = 1024


def _call(
    d_kv: int = 64,
    window: str = "narrow",
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_bias: bool = True,
    is_packed: bool = False,
    dropout_p: float = 0.0,
    length: int = _LENGTH,
) -> None:
    qkv = torch.zeros(1, length, 3, 2, d_kv, dtype=dtype, requires_grad=True)
    offset_bias = torch.zeros(2, 257, requires_grad=True) if has_bias else None
    segment_ids = torch.ones(1, length, dtype=torch.int64) if is_packed else None
    left, right = _WINDOWS[window]
    o = local_attention_triton(*qkv.unbind(2), offset_bias, left, right, segment_ids, dropout_p)
    o.backward(torch.zeros_like(o))


CASES: dict[str, Callable[[], None]] = {
    f"d{d_kv}/{window}/{str(dtype).removeprefix('torch.')}/{'packed' if is_packed else 'plain'}": (
        lambda d_kv=d_kv, window=window, dtype=dtype, is_packed=is_packed: _call(  # type: ignore[misc]
            d_kv, window, dtype, is_packed=is_packed
        )
    )
    for d_kv in HEAD_SIZES
    for window in _WINDOWS
    for dtype in (torch.bfloat16, torch.float32)
    for is_packed in (False, True)
} | {
    "d64/narrow/float16/packed": lambda: _call(dtype=torch.float16, is_packed=True),
    "d64/narrow/bfloat16/ragged": lambda: _call(length=1000),
    "d64/narrow/bfloat16/no bias": lambda: _call(has_bias=False),
    "d64/narrow/bfloat16/packed/dropout": lambda: _call(is_packed=True, dropout_p=0.1),
    "d64/causal/bfloat16/packed/dropout": lambda: _call(window="causal", is_packed=True, dropout_p=0.1),
    "d128/full/bfloat16/packed/dropout/ragged": lambda: _call(128, "full", is_packed=True, dropout_p=0.1, length=1000),
}

"""Gated GELU, forward and backward."""

from collections.abc import Callable

import torch

from spade_t5.kernels.gated_gelu.triton_op import gated_gelu_triton


def _call(dtype: torch.dtype) -> None:
    a, b = (torch.zeros(64, 2048, dtype=dtype, requires_grad=True) for _ in range(2))
    gated_gelu_triton(a, b).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    str(dtype).removeprefix("torch."): lambda dtype=dtype: _call(dtype)  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}

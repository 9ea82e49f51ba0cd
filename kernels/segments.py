"""What the ops demand of `segment_ids`: 0 = padding, 1, 2, ... = number of the document within its row."""

import torch
from torch import Tensor


def check_segment_ids(segment_ids: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `segment_ids` is an int64 (B, L) tensor on the device of `x`, which is (B, L, ...)."""
    if segment_ids.shape != x.shape[:2]:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}; expected (batch, length) = {tuple(x.shape[:2])}"
        )
    if segment_ids.dtype != torch.int64:
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; cast it to torch.int64")
    if segment_ids.device != x.device:
        raise ValueError(f"segment_ids is on {segment_ids.device}; move it to {x.device}")

"""What the ops demand of `segment_ids`: 0 = padding, 1, 2, ... = number of the document within its row."""

import torch
from torch import Tensor


def check_segment_ids(segment_ids: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `segment_ids` is an int64 (B, L) tensor on the device of `x`, which is (B, L, ...).

    On a CPU the order of the ids is checked too.
    """
    if segment_ids.shape != x.shape[:2]:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}; expected (batch, length) = {tuple(x.shape[:2])}"
        )
    if segment_ids.dtype != torch.int64:
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}; cast it to torch.int64")
    if segment_ids.device != x.device:
        raise ValueError(f"segment_ids is on {segment_ids.device}; move it to {x.device}")
    if segment_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        check_segment_order(segment_ids)


def check_segment_order(segment_ids: Tensor, name: str = "segment_ids") -> None:
    """Raise ValueError unless the ids of every row are at least 0 and do not decrease, padding (0) left out.

    Reads the values: on a GPU that would stall the host, so ids are checked where batches are made and by ops on a CPU.
    """
    if bool((segment_ids < 0).any()):
        raise ValueError(f"{name} holds {int(segment_ids.min())}; number documents 1, 2, ... and padding 0")
    if bool(((segment_ids < segment_ids.cummax(dim=1).values) & (segment_ids != 0)).any()):
        raise ValueError(f"{name} decrease within a row; number the documents of a row in order, 0 for padding")

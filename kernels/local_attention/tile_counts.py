"""How many tiles the Triton kernels of local attention multiply, told from the documents of rows: the walk of each kernel, without a GPU.

Shapes: B rows, L tokens, C tiles of a row, R tokens of a tile.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spade_t5.kernels.launch import LaunchConfig, launch_config_on
from spade_t5.kernels.local_attention.triton_op import config_variant

Ints = NDArray[np.int64]


class Tiles(NamedTuple):
    """Scores of one head in all rows, in whole tiles."""

    forward: int
    """Two products each."""
    queries: int
    """Of the backward pass to the queries: three products each."""
    keys: int
    """Of the backward pass to the keys: four products each."""


def count_tiles(
    segment_ids: Ints | None,
    rows: int,
    length: int,
    left: int | None,
    right: int | None,
    *,
    d_kv: int,
    dtype: torch.dtype,
    dropout_p: float,
    architecture: str,
) -> Tiles:
    """Scores that the kernels compute, those of hidden pairs inside a tile included.

    Args:
        segment_ids: (B, L), 0 = padding; None: every row is one document.
        rows: B.
        length: L.
        left: as of `local_attention`, like the next.
        right: see there.
        d_kv: see there.
        dtype: of the queries.
        dropout_p: see there.
        architecture: of the GPU, such as "sm_90".
    """
    if segment_ids is None:
        segment_ids = np.ones((1, length), dtype=np.int64)
    else:
        rows = 1
    bounds = _document_bounds(segment_ids)

    def config(kernel: str) -> LaunchConfig:
        return launch_config_on(
            "local_attention", config_variant(kernel, d_kv, dtype, left, right, dropout_p), architecture
        )

    before, after = (length if reach is None else reach for reach in (left, right))
    forward, queries, keys = config("fwd"), config("dq"), config("dkdv")
    query_columns = queries["BLOCK_N"] if dtype != torch.float32 else queries["BLOCK_M"]  # whose rotation needs squares
    return Tiles(
        rows * _scores(bounds, length, forward["BLOCK_M"], forward["BLOCK_N"], before, after),
        rows * _scores(bounds, length, queries["BLOCK_M"], query_columns, before, after),
        rows * _scores(bounds, length, keys["BLOCK_N"], keys["BLOCK_M"], after, before),
    )


def _document_bounds(segment_ids: Ints) -> tuple[Ints, Ints]:
    """First position and end of each token's document; L and 0 for padding. (B, L) each."""
    length = segment_ids.shape[1]
    segment_ids = segment_ids.astype(np.int32, copy=False)  # half the memory to walk over
    positions = np.arange(length, dtype=np.int32)
    is_new = np.ones_like(segment_ids, dtype=bool)
    is_new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_last = np.ones_like(is_new)
    is_last[:, :-1] = is_new[:, 1:]
    first = np.maximum.accumulate(np.where(is_new, positions, 0), axis=1)
    end = np.minimum.accumulate(np.where(is_last, positions + 1, length)[:, ::-1], axis=1)[:, ::-1]
    is_padding = segment_ids == 0
    return np.where(is_padding, length, first), np.where(is_padding, 0, end)


def _scores(bounds: tuple[Ints, Ints], length: int, rows: int, columns: int, before: int, after: int) -> int:
    """Scores of tiles of `rows` tokens that walk in steps of `columns` over what they see."""
    starts = np.arange(0, length, rows)
    first = np.minimum.reduceat(bounds[0], starts, axis=1)
    end = np.maximum.reduceat(bounds[1], starts, axis=1)
    first = np.maximum(first, np.maximum(starts - before, 0)) // columns * columns
    end = np.minimum(end, np.minimum(starts + rows + after, length))
    steps = -(-np.maximum(end - first, 0) // columns)
    return int(steps.sum()) * rows * columns

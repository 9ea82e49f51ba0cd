"""How many chunks the Triton kernels of the SSM convolution multiply, told from the documents of rows, without a GPU."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spade_t5.kernels.launch import launch_config_on
from spade_t5.kernels.ssm_conv.chunked_op import length_class

Ints = NDArray[np.int64]


class Chunks(NamedTuple):
    """Of all rows, in whole tiles, for every channel."""

    tokens: int
    """Tokens of a chunk."""
    columns: int
    """Chunks that pass on states."""
    pieces: int
    """Chunks times the documents that the tile takes them apart into: products of tokens with tokens."""


def count_chunks(segment_ids: Ints | None, rows: int, length: int, *, dtype: torch.dtype, architecture: str) -> Chunks:
    """Chunks as the kernels walk over them.

    Args:
        segment_ids: (rows, length), 0 = padding; None: every row is one document.
        rows: B.
        length: L.
        dtype: of the input.
        architecture: of the GPU, such as "sm_90".
    """
    tokens = launch_config_on("ssm_conv", f"chunk/{length_class(length)}", architecture)["TOKENS"]
    precision = "float" if dtype == torch.float32 else "half"
    block = launch_config_on("ssm_conv", f"outputs/{precision}", architecture)["BLOCK_X"]
    num_columns = rows * -(-length // tokens)
    whole = -(-num_columns // block) * block
    if segment_ids is None:
        return Chunks(tokens, whole, whole)
    padded = np.pad(segment_ids, ((0, 0), (0, -length % tokens)))
    documents = np.maximum.accumulate(padded, axis=1).reshape(num_columns, tokens)
    pieces = 1 + (documents[:, 1:] != documents[:, :-1]).sum(axis=1)
    most = np.maximum.reduceat(pieces, np.arange(0, num_columns, block))
    return Chunks(tokens, whole, block * int(most.sum()))

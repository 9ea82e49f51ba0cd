"""Documents of packed rows as the chunked convolution sees them: masks over chunks of fixed size.

Chunks are aligned to the row, not to documents: a list of chunks for each document would have a length that only the
device knows. Padding belongs to the document before it, which may go on behind it, and carries no signal.

A row of 2 chunks of 4 tokens, segment_ids 1 1 2 0 | 2 2 3 0:

    piece         0  0  1 -1 | 0  0  1 -1      run of one document within the chunk; -1: padding
    num_pieces    2            2
    is_linked     false        true            the chunk begins in the document that the chunk before ends in
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkDocuments(NamedTuple):
    """Masks of a batch of packed rows; B rows, C chunks of T tokens."""

    piece: Tensor
    """(B, C, T) int16."""
    num_pieces: Tensor
    """(B, C) int32, at least 1."""
    is_linked: Tensor
    """(B, C) int32, 0 or 1; 0 for the first chunk."""


def chunk_documents(segment_ids: Tensor, chunk_tokens: int) -> ChunkDocuments:
    """Find the documents of each chunk, without a look at values from the host.

    Args:
        segment_ids: (B, L) int64, 0 = padding anywhere, else non-decreasing.
        chunk_tokens: T.
    """
    length = segment_ids.shape[1]
    ids_BL = F.pad(segment_ids, (0, -length % chunk_tokens))
    document_BCT = ids_BL.cummax(dim=1).values.unflatten(1, (-1, chunk_tokens))
    is_new_BCT = F.pad(document_BCT[:, :, 1:] != document_BCT[:, :, :-1], (1, 0))
    run_BCT = is_new_BCT.cumsum(dim=2, dtype=torch.int32)
    piece_BCT = torch.where(ids_BL.view_as(run_BCT) == 0, -1, run_BCT).to(torch.int16)
    is_linked_BC = F.pad(document_BCT[:, 1:, 0] == document_BCT[:, :-1, -1], (1, 0))
    return ChunkDocuments(piece_BCT, run_BCT[:, :, -1] + 1, is_linked_BC.to(torch.int32))

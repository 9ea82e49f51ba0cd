"""Segment ids of packed rows: which document a token belongs to.

A row holds several documents one after the other; `segment_ids` (B, L) int64 says for each token which one,
0 = padding, 1, 2, ... = documents. A document is a run of equal ids. Everything that must not cross a document
is derived here:

    segment_ids            1 1 1 1 1 2 2 0 3 3
    positions              0 1 2 3 4 0 1 0 0 1
    chunks of 2 tokens     1 1 2 2 3 4 4 0 6 6        (ids only need to differ)
    labels                 a b c d e f g - h i
    shifted right          s a b c d s f p s h        (s: decoder start, p: padding)
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spade_t5.ops import DocumentPairs, pair_documents, visible_keys


@dataclass(frozen=True)
class SourceView:
    """What the target tokens may see of the source, the same for every decoder layer."""

    target_documents_BT: Tensor | None
    """Document of each target token, 0 = padding; None: every target sees all of the source but its padding."""
    source_documents_BL: Tensor | None
    """Document of each source token, 0 = padding; None: no token is padding and all are one document."""
    pairs: DocumentPairs | None = None
    """The same laid out for attention document by document."""

    def with_pairs(self, target_tokens: int) -> "SourceView":
        """Find the documents once for all layers, and keep them where they save work."""
        if self.source_documents_BL is None:
            return self
        pairs = pair_documents(self.target_documents_BT, self.source_documents_BL, target_tokens)
        return replace(self, pairs=pairs) if pairs.is_worth_while else self

    def to(self, device: torch.device, non_blocking: bool = False) -> "SourceView":
        """The same on another device: accelerate's hooks call it where layers lie on several."""

        def move(x: Any) -> Any:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return SourceView(move(self.target_documents_BT), move(self.source_documents_BL), move(self.pairs))

    def is_visible(self) -> Tensor | None:
        """Bool, broadcastable to (B, T, L): True where a target token sees a source token; None: everywhere."""
        return visible_keys(self.target_documents_BT, self.source_documents_BL)


WHOLE_SOURCE = SourceView(target_documents_BT=None, source_documents_BL=None)
"""Every target token sees every source token."""


def segments_from_mask(attention_mask_BL: Tensor | None) -> Tensor | None:
    """Segment ids of rows with one document each; None (the fast path) if the mask is absent or hides nothing.

    That a mask hides nothing is only looked up on a CPU: on an accelerator it would stall the host.
    """
    if attention_mask_BL is None:
        return None
    is_visible_BL = attention_mask_BL != 0
    if is_visible_BL.device.type == "cpu" and bool(is_visible_BL.all()):
        return None
    return is_visible_BL.long()


def segment_starts(segment_ids_BL: Tensor) -> Tensor:
    """True at the first token of every run of equal ids, (B, L) bool."""
    starts_BL = torch.ones_like(segment_ids_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return starts_BL


def segment_positions(segment_ids_BL: Tensor) -> Tensor:
    """Position of each token inside its document, in tokens, (B, L) int64; 0 at padding."""
    index_L = torch.arange(segment_ids_BL.shape[1], device=segment_ids_BL.device)
    start_BL = torch.where(segment_starts(segment_ids_BL), index_L, 0).cummax(dim=1).values
    return (index_L - start_BL).masked_fill(segment_ids_BL == 0, 0)


def chunk_segments(segment_ids_BL: Tensor, chunk_tokens: int) -> Tensor:
    """Segment ids refined so that every block of `chunk_tokens` tokens of a document is a segment of its own.

    Blocks are counted from the first token of each document, so packing does not move them.
    """
    starts_BL = segment_positions(segment_ids_BL) % chunk_tokens == 0
    return starts_BL.long().cumsum(dim=1).masked_fill(segment_ids_BL == 0, 0)


def shift_right(labels_BT: Tensor, *, start_id: int, pad_id: int, segment_ids_BT: Tensor | None = None) -> Tensor:
    """Decoder inputs for teacher forcing: labels moved one token to the right inside each document.

    Args:
        labels_BT: target ids; negative values (ignored labels) become `pad_id`.
        start_id: id put at the first token of each document.
        pad_id: id put at padding.
        segment_ids_BT: documents of a packed row; None: one document a row.
    """
    shifted_BT = torch.full_like(labels_BT, start_id)
    shifted_BT[:, 1:] = labels_BT[:, :-1]
    if segment_ids_BT is not None:
        shifted_BT = shifted_BT.masked_fill(segment_starts(segment_ids_BT), start_id)
        shifted_BT = shifted_BT.masked_fill(segment_ids_BT == 0, pad_id)
    return shifted_BT.masked_fill(shifted_BT < 0, pad_id)

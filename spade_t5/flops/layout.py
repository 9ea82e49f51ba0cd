"""What of a batch decides its FLOPs: its shape, and how long its documents are.

A row of 8 inputs and 5 targets, 0 and -100 being padding:

    segment_ids          1 1 1 1 2 2 0 0        input_tokens    4 2
    decoder_segment_ids  1 1 1 2 0              target_tokens   3 1
    labels               7 8 1 1 -100           labelled        4
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spade_t5.training.data import Batch
from spade_t5.training.objectives import IGNORED_LABEL

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """Shape and documents of one micro-batch."""

    rows: int
    """B."""
    inputs_length: int
    """L, padding included."""
    targets_length: int
    """T, padding included; 0 where there is no decoder."""
    input_tokens: Ints
    """Source tokens of each document (N,); 0: it has targets alone."""
    target_tokens: Ints
    """Target tokens of the same documents (N,)."""
    labelled: int
    """Terms of the loss: target tokens, or documents of a classifier, with a label."""
    label_columns: int
    """Documents that a classifier scores in each row."""
    segment_ids: Ints | None
    """(B, L), 0 = padding; None: each row is one document."""
    decoder_segment_ids: Ints | None
    """(B, T), likewise."""

    @classmethod
    def of(cls, batch: Batch, *, has_decoder: bool) -> "BatchLayout":
        """The layout of a batch that lies on the CPU.

        Args:
            batch: as an objective takes it.
            has_decoder: its labels are target tokens; else one for each document.
        """
        labels = _array(batch["labels"])
        rows, inputs_length = batch["input_ids"].shape
        sources = _documents(batch, "segment_ids", "attention_mask")
        is_labelled = ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORED_LABEL
        if has_decoder:
            targets = _documents(batch, "decoder_segment_ids", "decoder_attention_mask")
            real_targets = targets
            if targets is None and not is_labelled.all():
                # Behind the last label nothing is asked of the decoder, whatever the mask says.
                real_targets = np.flip(np.maximum.accumulate(np.flip(is_labelled, 1), axis=1), 1).astype(np.int64)
        else:
            targets = real_targets = np.zeros((rows, 0), dtype=np.int64)
        num_documents = max(_largest(sources), _largest(real_targets)) if "segment_ids" in batch else 1
        return cls(
            rows=rows,
            inputs_length=inputs_length,
            targets_length=labels.shape[1] if has_decoder else 0,
            input_tokens=_lengths(sources, rows, inputs_length, num_documents),
            target_tokens=_lengths(real_targets, rows, labels.shape[1] if has_decoder else 0, num_documents),
            labelled=int(is_labelled.sum()),
            label_columns=1 if has_decoder or labels.ndim == 1 else labels.shape[1],
            segment_ids=sources,
            decoder_segment_ids=targets if has_decoder else None,
        )


def _array(tensor: Tensor) -> NDArray[np.generic]:
    return tensor.detach().cpu().numpy()


def _documents(batch: Batch, ids_name: str, mask_name: str) -> Ints | None:
    """Segment ids as the model resolves them: a mask that hides nothing is none."""
    if ids_name in batch:
        return _array(batch[ids_name]).astype(np.int64, copy=False)
    if mask_name not in batch:
        return None
    mask = (_array(batch[mask_name]) != 0).astype(np.int64)
    return None if mask.all() else mask


def _largest(ids: Ints | None) -> int:
    return 1 if ids is None or ids.size == 0 else int(ids.max())


def _lengths(ids: Ints | None, rows: int, length: int, num_documents: int) -> Ints:
    """Tokens of the documents 1 .. `num_documents` of every row, (rows x num_documents,)."""
    if ids is None:
        lengths = np.zeros((rows, num_documents), dtype=np.int64)
        lengths[:, 0] = length
        return lengths.ravel()
    stride = num_documents + 1
    counts = np.bincount((ids + np.arange(rows)[:, None] * stride).ravel(), minlength=rows * stride)
    return counts.reshape(rows, stride)[:, 1:].ravel()

"""What is minimised: a batch in, a summed loss and its number of targets out.

The engine divides the sums of all micro-batches and ranks by the number of targets of the whole optimizer step, so padding, packing,
accumulation and the number of ranks do not change the loss.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_t5.layers.segments import shift_right
from spade_t5.training.data import Batch

IGNORED_LABEL = -100


class Objective(Protocol):
    """The mathematics of a kind of training."""

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the loss of a batch."""
        ...

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of those terms, a float32 scalar with a gradient, also when there are none."""
        ...


class Seq2SeqObjective:
    """Cross-entropy of the target tokens: sum over valid t of -log p(label_t | labels before t, inputs)."""

    def __init__(self, *, decoder_start_token_id: int, pad_token_id: int) -> None:
        """Takes the ids that the right shift of the labels puts at starts and at padding."""
        self._start_id = decoder_start_token_id
        self._pad_id = pad_token_id

    def num_targets(self, batch: Batch) -> int:
        """Number of target tokens."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy summed over the target tokens."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"]
        inputs["decoder_input_ids"] = shift_right(
            labels, start_id=self._start_id, pad_id=self._pad_id, segment_ids_BT=batch.get("decoder_segment_ids")
        )
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )


class ClassificationObjective:
    """Cross-entropy over label indices, or squared error where there is a single output."""

    def __init__(self, num_labels: int) -> None:
        """`num_labels` is the number of outputs; 1 means regression."""
        self.num_labels = num_labels

    def num_targets(self, batch: Batch) -> int:
        """Number of labelled documents; absent ones are -100, or NaN in regression."""
        return int(self._is_present(batch["labels"]).sum())

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss summed over the labelled documents."""
        labels = batch["labels"]
        logits = model(**batch).logits.float()
        if self.num_labels > 1:
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        is_present = self._is_present(labels)
        error = logits.reshape(labels.shape) - labels.masked_fill(~is_present, 0.0)
        return (error.square() * is_present).sum()

    @staticmethod
    def _is_present(labels: Tensor) -> Tensor:
        return ~torch.isnan(labels) if labels.is_floating_point() else labels != IGNORED_LABEL

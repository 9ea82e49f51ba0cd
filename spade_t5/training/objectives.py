"""What is minimised: a batch in, a summed loss and its number of targets out.

The engine divides the sums of all micro-batches and ranks by the number of targets of the whole optimizer step, so padding, packing,
accumulation and the number of ranks do not change the loss.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_t5.layers.head import TokenLossConfig
from spade_t5.training.data import Batch

IGNORED_LABEL = -100
PLAIN_CROSS_ENTROPY = TokenLossConfig()


class Objective(Protocol):
    """The mathematics of a kind of training."""

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the loss of a batch."""
        ...

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of those terms, a float32 scalar with a gradient, also when there are none."""
        ...


class Seq2SeqObjective:
    """Cross-entropy of the target tokens: sum over valid t of -log p(label_t | labels before t, inputs).

    While the model trains, z-loss and label smoothing come on top, if configured; in evaluation the sum is as above.
    """

    def __init__(self, token_loss: TokenLossConfig = PLAIN_CROSS_ENTROPY) -> None:
        """Takes what training adds."""
        self._token_loss = token_loss

    def num_targets(self, batch: Batch) -> int:
        """Number of target tokens."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss summed over the target tokens, from the decoder states, without logits."""
        token_loss = self._token_loss if model.training else PLAIN_CROSS_ENTROPY
        return model(**batch, token_loss=token_loss, use_cache=False).loss


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

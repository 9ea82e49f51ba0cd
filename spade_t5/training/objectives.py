"""What is minimised: a batch in, a summed loss and its number of targets out, and the same for every group of documents.

The engine divides the sums of all micro-batches and ranks by the number of targets of the whole optimizer step, so padding, packing,
accumulation and the number of ranks do not change the loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_t5.layers.head import TokenLossConfig
from spade_t5.training.data import Batch, model_arguments

IGNORED_LABEL = -100
PLAIN_CROSS_ENTROPY = TokenLossConfig()


Group = Mapping[str, str]
"""A kind of documents: its label on every axis, such as {"corpus": "c4", "length": "257-512"}."""


class LossSums(NamedTuple):
    """Sums over the targets of a batch."""

    whole: Tensor
    """Of the loss: a float32 scalar with a gradient, also when there are no targets."""
    by_group: Tensor
    """(G, 2) float64 without a gradient: loss and number of targets of every group; (0, 2) where there are no groups."""


class Objective(Protocol):
    """The mathematics of a kind of training."""

    groups: Sequence[Group]
    """Kinds of documents whose losses are also summed apart."""

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the loss of a batch."""
        ...

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        """Sums of those terms."""
        ...


class Seq2SeqObjective:
    """Cross-entropy of the target tokens: sum over valid t of -log p(label_t | labels before t, inputs).

    Where gradients are kept, z-loss and label smoothing come on top, if configured; in evaluation, without them, the sum is as above.

    Args:
        token_loss: what training adds.
        groups: kinds of documents that the loss is told apart by; the entry `loss_groups` of a batch says which of them each
            document is.
    """

    def __init__(self, token_loss: TokenLossConfig = PLAIN_CROSS_ENTROPY, groups: Sequence[Group] = ()) -> None:
        self._token_loss = token_loss
        self.groups = groups

    def num_targets(self, batch: Batch) -> int:
        """Number of target tokens."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        """Loss summed over the target tokens, from the decoder states, without logits."""
        # Not `model.training`: DeepSpeed's engine stays in training mode, only the module within it changes.
        token_loss = self._token_loss if torch.is_grad_enabled() else PLAIN_CROSS_ENTROPY
        output = model(**model_arguments(batch), token_loss=token_loss, use_cache=False)
        return LossSums(output.loss, self._sums_by_group(output.token_losses, batch))

    def _sums_by_group(self, losses_BT: Tensor, batch: Batch) -> Tensor:
        if not self.groups:
            return losses_BT.new_empty((0, 2), dtype=torch.float64)
        loss_BS, targets_BS = _sums_by_document(losses_BT, batch)
        # Not by adding at indices: a GPU does that in any order, and the same step would not always report the same numbers.
        is_group_GX = torch.arange(len(self.groups), device=losses_BT.device)[:, None] == batch["loss_groups"].flatten()
        return torch.stack([is_group_GX.double() @ sums_BS.flatten() for sums_BS in (loss_BS, targets_BS)], dim=1)


def _sums_by_document(losses_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and number of targets of every document, as columns of `loss_groups`: (B, S) float64, 0 where there is none."""
    num_documents = batch["loss_groups"].shape[1]
    document_BT = batch.get("decoder_segment_ids")
    if document_BT is None:
        document_BT = torch.ones_like(batch["labels"])
    # Documents follow each other, with padding behind them: the sum of one is the difference of two running sums.
    document_BT = document_BT.masked_fill(document_BT == 0, num_documents + 1)
    numbers_BS = torch.arange(num_documents + 1, device=losses_BT.device).expand(len(losses_BT), -1)
    end_BS = torch.searchsorted(document_BT.contiguous(), numbers_BS.contiguous(), right=True)
    is_target_BT = batch["labels"] != IGNORED_LABEL
    sums = (
        F.pad(values_BT.double().cumsum(dim=1), (1, 0)).gather(1, end_BS) for values_BT in (losses_BT, is_target_BT)
    )
    loss_BS, targets_BS = (sums_BS.diff(dim=1) for sums_BS in sums)
    return loss_BS, targets_BS


class ClassificationObjective:
    """Cross-entropy over label indices, or squared error where there is a single output."""

    def __init__(self, num_labels: int) -> None:
        """`num_labels` is the number of outputs; 1 means regression."""
        self.num_labels = num_labels
        self.groups: Sequence[Group] = ()

    def num_targets(self, batch: Batch) -> int:
        """Number of labelled documents; absent ones are -100, or NaN in regression."""
        return int(self._is_present(batch["labels"]).sum())

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        """Loss summed over the labelled documents."""
        loss = self._summed_loss(model, batch)
        return LossSums(loss, loss.new_empty((0, 2), dtype=torch.float64))

    def _summed_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        logits = model(**model_arguments(batch)).logits.float()
        if self.num_labels > 1:
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        is_present = self._is_present(labels)
        error = logits.reshape(labels.shape) - labels.masked_fill(~is_present, 0.0)
        return (error.square() * is_present).sum()

    @staticmethod
    def _is_present(labels: Tensor) -> Tensor:
        return ~torch.isnan(labels) if labels.is_floating_point() else labels != IGNORED_LABEL


def loss_by_axis(groups: Iterable[Group], sums: Iterable[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Mean loss of every label that had targets, by axis.

    >>> groups = [{"corpus": "c4", "length": "1-64"}, {"corpus": "c4", "length": "65-128"}, {"corpus": "wiki", "length": "1-64"}]
    >>> loss_by_axis(groups, [(6.0, 2), (9.0, 4), (0.0, 0)])
    {'corpus': {'c4': 2.5}, 'length': {'1-64': 3.0, '65-128': 2.25}}

    Args:
        groups: the groups of an objective.
        sums: loss and number of targets of each.
    """
    totals: dict[str, dict[str, tuple[float, float]]] = {}
    for group, (loss, targets) in zip(groups, sums, strict=True):
        for axis, label in group.items():
            axis_totals = totals.setdefault(axis, {})
            loss_before, targets_before = axis_totals.get(label, (0.0, 0.0))
            axis_totals[label] = loss_before + loss, targets_before + targets
    return {
        axis: {label: loss / targets for label, (loss, targets) in axis_totals.items() if targets}
        for axis, axis_totals in totals.items()
    }

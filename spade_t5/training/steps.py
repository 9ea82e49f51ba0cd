"""The mathematics of one optimizer step, and of an evaluation, over all ranks and micro-batches.

The loss of a step is the sum over all its targets divided by their number, which is known before the first backward pass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spade_t5.training import distributed
from spade_t5.training.backend import Backend
from spade_t5.training.data import Batch, RowSource, evaluation_batches
from spade_t5.training.norms import PartNorms
from spade_t5.training.objectives import LossSums, Objective, loss_by_axis
from spade_t5.training.replicas import differing_ranks
from spade_t5.training.samples import sample_numbers
from spade_t5.training.timing import AnyClock


class StepResult(NamedTuple):
    """What came of a step."""

    loss: float
    """Per target."""
    loss_by: dict[str, dict[str, float]]
    """Of every label of every axis of the objective's groups; empty without groups."""
    grad_norm: float
    """Before clipping; not finite where the step was not applied."""
    differing_copies: dict[str, list[int]]
    """Ranks whose copies of weights differ from those of the others, by parameter, where they were compared."""
    norms: dict[str, dict[str, float]]
    """Of gradient and weights by part of the model, where they were measured."""

    @property
    def is_applied(self) -> bool:
        """Whether the weights were updated, on all ranks alike."""
        return math.isfinite(self.grad_norm)


class Evaluation(NamedTuple):
    """Result of an evaluation."""

    loss: float
    """Per target over all held-out rows."""
    targets: int
    """Number of targets."""
    loss_by: dict[str, dict[str, float]]
    """Of every label of every axis of the objective's groups; empty without groups."""


class Steps:
    """Runs a model on the batches of this rank, together with the other ranks.

    Args:
        backend: owner of the model and of the optimizer.
        objective: turns a batch into a summed loss.
        seed: of dropout, with the step, the micro-batch and the rank.
        micro_batch_rows: rows that an evaluation runs through the model at once.
        clock: is told what a step is at.
    """

    def __init__(
        self, backend: Backend, objective: Objective, *, seed: int, micro_batch_rows: int, clock: AnyClock
    ) -> None:
        self._backend, self._objective, self._clock = backend, objective, clock
        self._seed, self._micro_batch_rows = seed, micro_batch_rows
        self._device = distributed.device()

    def train(
        self,
        micro_batches: list[Batch],
        *,
        step: int,
        num_targets: int,
        learning_rate_factor: float,
        largest_loss: float,
        compares_copies: bool,
        norms: PartNorms | None,
    ) -> StepResult:
        """One optimizer step, applied on all ranks or on none.

        Args:
            micro_batches: this rank's share.
            step: its number.
            num_targets: over all ranks and micro-batches.
            learning_rate_factor: factor of the peak learning rates.
            largest_loss: a step with a larger loss, or one that is not finite, is not applied.
            compares_copies: compare the weights that ranks hold copies of; if they differ, the step is not applied.
            norms: measures the norms of gradient and weights; None: they are not measured.
        """
        # DeepSpeed averages gradients over ranks, hence the factor world size.
        scale = distributed.world_size() / max(num_targets, 1)
        sums = self._no_sums()
        self._backend.model.train()
        for micro, batch in enumerate(micro_batches):
            seeds = np.random.SeedSequence([self._seed, step, micro, distributed.rank()])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            with self._clock.within("forward"), self._backend.forward_context():
                loss_sums = self._loss_sums(batch)
            sums += _flat(loss_sums)
            if micro < len(micro_batches) - 1:
                self._backward(loss_sums.whole * scale, is_last=False)
        # Copies are compared before the update, which at ZeRO 1-3 replaces them all.
        differing = differing_ranks(self._backend) if compares_copies else {}
        # A loss that no rank may learn from turns the last gradient into NaN on all of them. Then one test, that of the gradient's norm,
        # covers losses and gradients at every ZeRO stage, and nothing has to be read back from a GPU before the backward pass.
        distributed.sum_over_ranks(sums)
        mean_loss = sums[0] / max(num_targets, 1)
        is_good = torch.isfinite(mean_loss) & (mean_loss <= largest_loss) & (not differing)
        last_scale = torch.where(is_good, scale, torch.nan).to(loss_sums.whole.dtype)
        self._backward(loss_sums.whole * last_scale, is_last=True)
        measured = None if norms is None else norms.measure()
        with self._clock.within("optimizer"):
            grad_norm = self._backend.step(learning_rate_factor)
        norm_metrics = {} if norms is None or measured is None else norms.as_metrics(measured)
        return StepResult(float(mean_loss), self._loss_by(sums), grad_norm, differing, norm_metrics)

    def evaluate(self, rows: RowSource, *, before_batch: Callable[[], None]) -> Evaluation:
        """Loss over all rows of a finite source.

        Args:
            rows: the source.
            before_batch: called before each batch of this rank.
        """
        batches = evaluation_batches(
            rows,
            micro_batch_rows=self._micro_batch_rows,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        sums, own_targets = self._no_sums(), 0
        self._backend.model.eval()
        with torch.no_grad(), self._backend.forward_context():
            for batch in batches:
                before_batch()
                own_targets += self._objective.num_targets(batch)
                sums += _flat(self._loss_sums(batch))
        (targets,) = distributed.all_reduce_sum([own_targets])
        distributed.sum_over_ranks(sums)
        return Evaluation(float(sums[0]) / max(targets, 1), int(targets), self._loss_by(sums))

    def samples_without_finite_loss(self, micro_batches: list[Batch], *, before_row: Callable[[], None]) -> list[int]:
        """Samples of this rank's rows whose loss is not finite by itself; every rank runs as many rows, as ZeRO 3 must.

        Args:
            micro_batches: this rank's share of a step.
            before_row: called before each row.
        """
        found: list[int] = []
        self._backend.model.eval()
        with torch.no_grad(), self._backend.forward_context():
            for batch in micro_batches:
                for row in range(len(next(iter(batch.values())))):
                    before_row()
                    alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
                    if not math.isfinite(float(self._loss_sums(alone).whole)):
                        found += sample_numbers([alone])
        return found

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        with self._clock.within("backward"):
            self._backend.backward(loss, is_last=is_last)

    def _loss_sums(self, batch: Batch) -> LossSums:
        on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        return self._objective.loss_sums(self._backend.model, on_device)

    def _no_sums(self) -> Tensor:
        return torch.zeros(1 + 2 * len(self._objective.groups), dtype=torch.float64, device=self._device)

    def _loss_by(self, sums: Tensor) -> dict[str, dict[str, float]]:
        group_sums = sums[1:].tolist()
        return loss_by_axis(self._objective.groups, zip(group_sums[::2], group_sums[1::2], strict=True))


def _flat(sums: LossSums) -> Tensor:
    """All sums in one float64 vector, so that they travel together."""
    return torch.cat([sums.whole.detach().double()[None], sums.by_group.flatten()])

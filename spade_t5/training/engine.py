"""The one training engine: it owns time. Steps, accumulation, evaluation dates, checkpoints and the end of a run are decided here.

The loss of an optimizer step is the sum over all its targets (all micro-batches, all ranks) divided by their number. That number is known
before the first backward pass, so padding, packing, accumulation and the number of ranks do not change what is learned.
"""

import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spade_t5 import ops
from spade_t5.checkpoint import load_checkpoint, save_checkpoint
from spade_t5.errors import ConfigError, StopRequestedError
from spade_t5.training import distributed
from spade_t5.training.backend import Backend, SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.data import Batch, BatchShape, Cursor, RowSource, TrainingRows, evaluation_batches
from spade_t5.training.deepspeed import DeepSpeedBackend, start_processes
from spade_t5.training.host_memory import keep_freed_memory
from spade_t5.training.objectives import LossSums, Objective, loss_by_axis
from spade_t5.training.reporting import Reporter, draw_loss_curve

logger = logging.getLogger("spade_t5")


class Evaluation(NamedTuple):
    """Result of an evaluation."""

    loss: float
    """Per target over all held-out rows."""
    targets: int
    """Number of targets."""
    loss_by: dict[str, dict[str, float]]
    """Of every label of every axis of the objective's groups; empty without groups."""


class Trainer:
    """Trains one model on numbered rows."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        train_rows: TrainingRows,
        eval_rows: RowSource | None,
        config: TrainingConfig,
        run_dir: Path,
        facts: dict[str, Any],
    ) -> None:
        """Wraps the model for training.

        Args:
            model: the model, with the same weights on every rank.
            objective: turns a batch into a summed loss.
            train_rows: training rows, which never end.
            eval_rows: held-out rows, all of which are evaluated; None: no evaluation.
            config: the run's settings.
            run_dir: an existing folder, the same for all ranks.
            facts: JSON values that every checkpoint carries, such as the resolved config.
        """
        start(config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        self.backend = make_backend(model, config)
        self.objective = objective
        self.config = config
        self.run_dir = run_dir
        self._train_rows, self._eval_rows = train_rows, eval_rows
        self._facts = facts
        self._step = 0
        self._tokens = 0
        self._cursor: Cursor | None = None
        self._device = distributed.device()
        self._stop_signal: int | None = None

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint: weights, optimizer state, step, and place in the data.

        Raises:
            DataError: the checkpoint is damaged or does not fit the model.
        """
        state = load_checkpoint(checkpoint, self.backend)
        self._step, self._tokens, self._cursor = state["step"], state["tokens"], state["cursor"]
        logger.info("resumed from %s at step %d", checkpoint, self._step)

    def fit(self) -> None:
        """Trains to the last step; evaluates, saves and draws the loss curve on the way and at the end.

        Raises:
            StopRequestedError: a signal asked to stop; a checkpoint was saved.
            FloatingPointError: the loss or the gradient is not finite.
        """
        if self._step >= self.config.steps:
            logger.info("nothing to do: the run finished at step %d", self._step)
            return
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            if distributed.is_main():
                config = self.config
                with Reporter(
                    self.run_dir,
                    first_step=self._step + 1,
                    num_steps=config.steps,
                    log_every_steps=config.log_every_steps,
                ) as reporter:
                    self._run(reporter)
                draw_loss_curve(self.run_dir)
            else:
                self._run(None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def evaluate(self) -> Evaluation:
        """Loss over all held-out rows."""
        assert self._eval_rows is not None
        batches = evaluation_batches(
            self._eval_rows,
            micro_batch_rows=self.config.micro_batch_rows,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        own_sums, own_targets = self._no_sums(), 0
        self.backend.model.eval()
        with torch.no_grad(), self.backend.forward_context():
            for batch in batches:
                own_targets += self.objective.num_targets(batch)
                own_sums += _flat(self.objective.loss_sums(self.backend.model, self._to_device(batch)))
        targets, loss_sum, *group_sums = distributed.all_reduce_sum([own_targets, *own_sums.tolist()])
        return Evaluation(loss_sum / max(targets, 1), int(targets), self._loss_by(group_sums))

    def _run(self, reporter: Reporter | None) -> None:
        config = self.config
        shape = BatchShape(
            global_rows=config.global_batch_rows,
            micro_rows=config.micro_batch_rows,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.loader_workers,
        )
        started = time.monotonic()
        for micro_batches, cursor in self._train_rows.steps(self._cursor, config.steps - self._step, shape):
            self._cursor = cursor
            is_stopping = self._train_step(micro_batches, reporter, started)
            is_last = self._step == config.steps
            if self._eval_rows is not None and (is_last or _is_due(self._step, config.eval_every_steps)):
                self._report_evaluation(reporter)
            if is_last or is_stopping or _is_due(self._step, config.save_every_steps):
                self._save()
            if is_stopping and not is_last:
                raise StopRequestedError(
                    f"stopped at step {self._step} on request; start the same command again to go on"
                )
            started = time.monotonic()

    def _train_step(self, micro_batches: list[Batch], reporter: Reporter | None, started: float) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        step = self._step + 1
        own_targets = sum(self.objective.num_targets(batch) for batch in micro_batches)
        own_tokens = sum(_num_input_tokens(batch) for batch in micro_batches)
        targets, tokens, stops = distributed.all_reduce_sum(
            [own_targets, own_tokens, float(self._stop_signal is not None)]
        )
        # DeepSpeed averages gradients over ranks, hence the factor world size.
        scale = distributed.world_size() / max(targets, 1)
        own_sums = self._no_sums()
        self.backend.model.train()
        for micro, batch in enumerate(micro_batches):
            seeds = np.random.SeedSequence([self.config.seed, step, micro, distributed.rank()])
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            with self.backend.forward_context():
                sums = self.objective.loss_sums(self.backend.model, self._to_device(batch))
            self.backend.backward(sums.whole * scale)
            own_sums += _flat(sums)
        loss_sum, *group_sums = distributed.all_reduce_sum(own_sums.tolist())
        mean_loss = loss_sum / max(targets, 1)
        if not math.isfinite(mean_loss):
            raise FloatingPointError(
                f"the loss is {mean_loss} at step {step}; lower the learning rate or resume from an earlier checkpoint"
            )
        factor = self.config.schedule.factor(step, self.config.steps)
        grad_norm = self.backend.step(factor)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm} at step {step}; lower the learning rate or resume from an earlier checkpoint"
            )
        self._step, self._tokens = step, self._tokens + int(tokens)
        if reporter is not None:
            seconds = time.monotonic() - started
            reporter.train_step(
                {
                    "step": step,
                    "split": "train",
                    "loss": mean_loss,
                    "lr": self.config.optimizer.learning_rate * factor,
                    "grad_norm": grad_norm,
                    "targets": int(targets),
                    "tokens": self._tokens,
                    "tokens_per_second": tokens / seconds,
                    "seconds": seconds,
                    **_group_metrics(self._loss_by(group_sums)),
                }
            )
        return stops > 0

    def _report_evaluation(self, reporter: Reporter | None) -> None:
        result = self.evaluate()
        if reporter is not None:
            metrics = {"step": self._step, "split": "validation", "loss": result.loss, "targets": result.targets}
            reporter.evaluation({**metrics, **_group_metrics(result.loss_by)})

    def _save(self) -> None:
        assert self._cursor is not None, "a step was made"
        cursor = self._train_rows.merge_cursors(distributed.gather_objects(self._cursor))
        path = save_checkpoint(
            self.run_dir / "checkpoints",
            self.backend,
            step=self._step,
            facts={"tokens": self._tokens, "cursor": cursor, **self._facts},
            keep=self.config.keep_checkpoints,
        )
        logger.info("saved %s", path)

    def _no_sums(self) -> Tensor:
        return torch.zeros(1 + 2 * len(self.objective.groups), dtype=torch.float64, device=self._device)

    def _loss_by(self, group_sums: list[float]) -> dict[str, dict[str, float]]:
        pairs = zip(group_sums[::2], group_sums[1::2], strict=True)
        return loss_by_axis(self.objective.groups, pairs)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = number


def start(config: TrainingConfig) -> None:
    """Joins the other ranks, if there are any; to be called before anything waits for them.

    Raises:
        ConfigError: several processes were launched without DeepSpeed, DeepSpeed is not installed, or the ops' backend
            cannot serve.
    """
    distributed.die_with_parent()
    ops.configure_backend(config.kernel_backend, distributed.device())
    if distributed.device().type == "cpu":
        keep_freed_memory()
    if config.deepspeed is not None:
        start_processes()
    elif distributed.launched_world_size() > 1:
        raise ConfigError(
            f"training.deepspeed: null, but {distributed.launched_world_size()} processes were launched; set training.deepspeed.zero_stage=1"
        )


def make_backend(model: nn.Module, config: TrainingConfig) -> Backend:
    """DeepSpeed where the config has it, else plain PyTorch in one process."""
    if config.deepspeed is not None:
        return DeepSpeedBackend(model, config)
    return SingleProcess(model, config)


def _flat(sums: LossSums) -> Tensor:
    """All sums in one float64 vector, so that they travel together."""
    return torch.cat([sums.whole.detach().double()[None], sums.by_group.flatten()])


def _group_metrics(loss_by: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"loss_by": loss_by} if loss_by else {}


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _num_input_tokens(batch: Batch) -> int:
    if "segment_ids" in batch:
        return int((batch["segment_ids"] != 0).sum())
    return batch["input_ids"].numel()

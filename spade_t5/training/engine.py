"""The one training engine: it owns time. Steps, accumulation, evaluation dates, checkpoints and the end of a run are decided here.

The loss of an optimizer step is the sum over all its targets (all micro-batches, all ranks) divided by their number. That number is known
before the first backward pass, so padding, packing, accumulation and the number of ranks do not change what is learned.

A step whose loss or gradient is not finite is skipped on all ranks: it counts, its samples are used up, and the weights stay.
"""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from spade_t5 import ops
from spade_t5.checkpoint import (
    CheckpointSaver,
    Retention,
    check_free_space,
    checkpoint_bytes,
    load_checkpoint,
    newest_good_checkpoint,
    take_snapshot,
)
from spade_t5.checkpoint.request import take_request
from spade_t5.checkpoint.state import EVALUATION_IS_DUE
from spade_t5.errors import ConfigError, RunAbortedError, SaveError, StopRequestedError
from spade_t5.training import distributed, samples
from spade_t5.training.agreement import on_main
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import Backend, SingleProcess
from spade_t5.training.compilation import compile_blocks
from spade_t5.training.config import TrainingConfig
from spade_t5.training.costs import StepCosts
from spade_t5.training.data import Batch, BatchShape, Cursor, RowSource, TrainingRows
from spade_t5.training.deepspeed import DeepSpeedBackend, start_processes
from spade_t5.training.host_memory import keep_freed_memory
from spade_t5.training.norms import PartNorms, PartOf, first_word
from spade_t5.training.objectives import Objective
from spade_t5.training.plots import draw_plots
from spade_t5.training.profiling import StepProfiler
from spade_t5.training.recomputation import recompute
from spade_t5.training.reporting import Curves, Reporter
from spade_t5.training.skipping import SkippedSteps
from spade_t5.training.spikes import SpikeDetector
from spade_t5.training.steps import Evaluation, StepResult, Steps
from spade_t5.training.stopping import StopRequests
from spade_t5.training.throughput import CountFlops, Work, work_of
from spade_t5.training.timing import Part, clock_of
from spade_t5.training.wandb_run import WandbRun
from spade_t5.training.watchdog import Phase, Watchdog

logger = logging.getLogger("spade_t5")

_PART_OF_PHASE: dict[Phase, Part] = {
    "compile": "data",
    "data": "data",
    "step": "rest",
    "evaluation": "evaluation",
    "save": "checkpoint",
}


class Agreed(NamedTuple):
    """What all ranks know of a step before its first backward pass, because they added it up."""

    work: Work
    """Of all ranks."""
    is_stopping: bool
    """Some rank was asked to stop."""
    is_save_requested: bool
    """`spade-t5 export --now` asked for a checkpoint."""
    has_written: bool
    """The checkpoint in flight has ended on every rank."""
    samples: str
    """Digest of the numbers of all samples."""


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
        before_publishing: Callable[[], dict[str, Any]] | None = None,
        count_flops: CountFlops | None = None,
        part_of: PartOf = first_word,
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
            before_publishing: called on the main rank before a checkpoint gets its name; raises to forbid it, and returns facts
                for the manifest.
            count_flops: operations that a batch, on the CPU, makes the model do; None: FLOPs and MFU are not reported.
            part_of: part of the model that a parameter belongs to, by its name, whose norms are reported.
        """
        start(config)
        recompute(model, config.recomputation)
        if config.compile:
            compile_blocks(model)
        self.backend = make_backend(model, config)
        self.objective = objective
        self._clock = clock_of(distributed.device())
        self._steps = Steps(
            self.backend,
            objective,
            seed=config.seed,
            micro_batch_rows=config.micro_batch_rows,
            clock=self._clock,
        )
        self._count_flops = count_flops
        self._norms = None if config.norms_every_steps is None else PartNorms(self.backend, part_of)
        self._costs = StepCosts(config)
        self.config = config
        self.run_dir = run_dir
        self._train_rows, self._eval_rows = train_rows, eval_rows
        self._facts = facts
        self._average = None if config.ema_decay is None else WeightAverage(self.backend.fragments(), config.ema_decay)
        self._saver = CheckpointSaver(
            run_dir / "checkpoints",
            Retention(
                keep_last=config.keep_checkpoints,
                keep_every_steps=config.keep_every_steps,
                keep_best=config.keep_best,
            ),
            before_publishing=before_publishing,
            timeout_seconds=config.timeouts.save_seconds,
        )
        self._step = 0
        self._tokens = 0
        self._cursor: Cursor | None = None
        self._skipped = SkippedSteps(config.max_skipped_in_a_row)
        self._spikes = None if config.spikes is None else SpikeDetector(config.spikes)
        self._held_out_loss: float | None = None
        self._is_evaluation_due = False
        self._is_save_requested = False
        self._resumed_from: Path | None = None
        self._rollbacks = 0
        self._stops: StopRequests | None = None
        self._reporter: Reporter | None = None
        self._watchdog: Watchdog | None = None
        self._profiler = StepProfiler(None, run_dir)

    def resume(self, checkpoint: Path, *, is_verified: bool = False) -> None:
        """Continues from a checkpoint: weights, optimizer state, step, and place in the data.

        Args:
            checkpoint: its folder.
            is_verified: its hashes were compared a moment ago.

        Raises:
            DataError: the checkpoint is damaged or does not fit the model.
        """
        state = load_checkpoint(checkpoint, self.backend, average=self._average, is_verified=is_verified)
        self._step, self._tokens, self._cursor = state["step"], state["tokens"], state["cursor"]
        self._skipped = SkippedSteps(self.config.max_skipped_in_a_row, state["skipped_steps"])
        if self.config.spikes is not None:
            self._spikes = SpikeDetector(self.config.spikes, state["losses"])
        self._is_evaluation_due = state[EVALUATION_IS_DUE] and self._eval_rows is not None
        self._resumed_from = checkpoint
        logger.info("resumed from %s at step %d", checkpoint, self._step)

    def fit(self) -> None:
        """Trains to the last step; evaluates, saves and draws curves on the way and at the end.

        Raises:
            StopRequestedError: a signal or the clock asked to stop; a checkpoint was saved.
            RunAbortedError: the run cannot go on: too many steps were skipped, or a checkpoint could not be written.
        """
        config = self.config
        if self._step >= config.steps and not self._is_evaluation_due:
            logger.info("nothing to do: the run finished at step %d", self._step)
            return
        self._check_free_space()
        self._warn_of_idle_ranks()
        self._clock.lap()
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.collectives_in(self._clock.waiting))
            self._stops = stack.enter_context(StopRequests(config.max_wall_seconds))
            if distributed.is_main():
                self._reporter = stack.enter_context(
                    Reporter(
                        self.run_dir,
                        first_step=self._step + 1,
                        num_steps=config.steps,
                        log_every_steps=config.log_every_steps,
                        curves=self._further_curves(),
                    )
                )
            stack.push(self._report_time)
            self._watchdog = stack.enter_context(Watchdog(config.timeouts, self.run_dir / "logs"))
            stack.callback(self._close_saver)
            self._profiler = StepProfiler(config.profile, self.run_dir)
            stack.callback(lambda: self._profiler.close(self._step))
            if self._is_evaluation_due:
                self._make_up_evaluation()
            while self._step < config.steps:
                self._run_until_rollback()
        if distributed.is_main():
            draw_plots(self.run_dir)

    def _warn_of_idle_ranks(self) -> None:
        """No error: a run may go on for a while on more ranks than it needs."""
        rows, ranks = self.config.global_batch_rows, distributed.world_size()
        if rows < ranks and distributed.is_main():
            logger.warning(
                "training.global_batch_rows: %d rows for %d ranks: %d of them compute nothing but padding in every step; start fewer "
                "ranks, or raise it",
                rows, ranks, ranks - rows,
            )  # fmt: skip

    def _further_curves(self) -> list[Curves]:
        if self.config.wandb is None:
            return []
        return [WandbRun(self.config.wandb, self.run_dir, self._facts.get("config", {}))]

    def evaluate(self) -> Evaluation:
        """Loss over all held-out rows."""
        assert self._eval_rows is not None
        self._clock.switch("evaluation")
        return self._steps.evaluate(self._eval_rows, before_batch=self._go_on_evaluating)

    def _run_until_rollback(self) -> None:
        """Trains to the last step, or until the weights went back to a checkpoint and the rows must be drawn anew."""
        config = self.config
        shape = BatchShape(
            global_rows=config.global_batch_rows,
            micro_rows=config.micro_batch_rows,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=config.loader_workers,
            warmup=config.batch_warmup,
        )
        steps = self._train_rows.steps(self._cursor, config.steps - self._step, shape, first_step=self._step + 1)
        self._enter("compile")
        is_first = True
        with contextlib.closing(steps):
            for micro_batches, self._cursor in steps:
                self._clock.switch("rest")
                if not is_first:
                    self._enter("step")
                agreed = self._agree(micro_batches)
                self._is_save_requested |= agreed.is_save_requested
                is_last = self._step + 1 == config.steps
                is_save_due = is_last or self._is_save_requested or _is_due(self._step + 1, config.save_every_steps)
                is_saving = is_save_due or agreed.is_stopping
                number = self._step + 1
                is_going_back = self._train_step(micro_batches, agreed, is_saving=is_saving)
                if self._profiler.is_due(number, is_going_back=is_going_back):
                    self._write_profile(number)
                if is_going_back:
                    return
                self._held_out_loss = None
                self._is_evaluation_due = self._eval_rows is not None and (
                    is_last or _is_due(self._step, config.eval_every_steps)
                )
                is_stopping = agreed.is_stopping or (self._is_evaluation_due and not self._report_evaluation())
                if agreed.has_written:
                    self._finish_saving()
                if is_save_due or is_stopping:
                    self._save(is_ending=is_last or is_stopping)
                if is_stopping and (not is_last or self._is_evaluation_due):
                    raise self._stop_requested()
                self._enter("data")
                is_first = False

    def _agree(self, micro_batches: list[Batch]) -> Agreed:
        is_save_requested = distributed.is_main() and take_request(self.run_dir)
        own = work_of(micro_batches, self.objective.num_targets, self._count_flops)
        stopping, requested, written, *sums = distributed.all_reduce_sum(
            [
                float(self._stops is not None and self._stops.is_stopping),
                float(is_save_requested),
                float(self._saver.is_finished),
                *own,
                *samples.digest_parts(samples.sample_numbers(micro_batches)),
            ]
        )
        return Agreed(
            work=Work(*sums[: len(own)]),
            is_stopping=stopping > 0,
            is_save_requested=requested > 0,
            has_written=written == distributed.world_size(),
            samples=samples.digest(sums[len(own) :]),
        )

    def _train_step(self, micro_batches: list[Batch], agreed: Agreed, *, is_saving: bool) -> bool:
        """One optimizer step, behind which the weights may be saved; returns whether it ended in a rollback."""
        step = self._step + 1
        factor = self.config.schedule.factor(step, self.config.steps)
        with self._profiler.step(step):
            result = self._steps.train(
                micro_batches,
                step=step,
                num_targets=int(agreed.work.targets),
                learning_rate_factor=factor,
                largest_loss=self._largest_loss,
                compares_copies=self._is_comparison_due(is_saving),
                norms=self._norms if _is_due(step, self.config.norms_every_steps) else None,
            )
        seconds_by = self._clock.lap()
        self._step, self._tokens = step, self._tokens + int(agreed.work.tokens)
        if result.is_applied and self._average is not None:
            with self._clock.within("optimizer"):
                self._average.update()
        self._report_step(result, agreed, factor, seconds_by)
        if result.is_applied:
            if self._spikes is not None:
                self._spikes.add(result.loss)
            return False
        if result.differing_copies:
            return self._on_differing_copies(result.differing_copies)
        return self._on_skipped_step(micro_batches, result.loss)

    def _write_profile(self, step: int) -> None:
        """Writes what ranks recorded up to a step. The others wait, so that the time is in no step of any rank."""
        self._enter("save")
        with self._clock.within("profile"):
            self._profiler.close(step)
            distributed.all_reduce_sum([0.0])

    def _report_step(
        self, result: StepResult, agreed: Agreed, learning_rate_factor: float, seconds_by: dict[Part, float]
    ) -> None:
        """Records what came of a step, and what it took."""
        costs = self._costs.metrics(self._step, agreed.work, seconds_by)
        if self._reporter is None:
            return
        self._reporter.train_step(
            {
                "step": self._step,
                "split": "train",
                "loss": result.loss,
                "lr": self.config.optimizer.learning_rate * learning_rate_factor,
                "grad_norm": result.grad_norm,
                "targets": int(agreed.work.targets),
                "tokens": self._tokens,
                **costs,
                "samples": agreed.samples,
                **result.norms,
                **_group_metrics(result.loss_by),
            }
        )

    def _report_time(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Records where the time went, at the end of a run that did not fail."""
        if kind is not None and not issubclass(kind, StopRequestedError):
            return
        self._record("time", **self._costs.total(self._clock.lap()))

    @property
    def _largest_loss(self) -> float:
        return math.inf if self._spikes is None else self._spikes.limit

    def _on_skipped_step(self, micro_batches: list[Batch], loss: float) -> bool:
        """Traces a step that was not applied to its samples, and rolls back if that is the policy; returns whether it did."""
        is_spike = math.isfinite(loss) and loss > self._largest_loss
        if is_spike:
            reason = f"the loss {loss:.4f} is a spike, above {self._largest_loss:.4f}"
            found = []
        else:
            reason = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            found = self._steps.samples_without_finite_loss(micro_batches, before_row=lambda: self._enter("step"))
        parts = distributed.gather_objects((found, samples.sample_numbers(micro_batches)))
        culprits = {rank: numbers for rank, (numbers, _) in enumerate(parts) if numbers}
        self._record(
            "spike" if is_spike else "skipped_step",
            reason=reason,
            ranks=list(culprits),
            sample_numbers=sorted(number for numbers in culprits.values() for number in numbers),
            step_sample_numbers=sorted(number for _, numbers in parts for number in numbers),
        )
        logger.warning(
            "step %d: skipped, %s; samples %s",
            self._step,
            reason,
            culprits or "unknown: no row alone gives it, see events.jsonl for all of the step",
        )
        self._skipped.add(self._step, reason)
        if is_spike and self.config.spikes is not None and self.config.spikes.action == "rollback":
            return self._roll_back(reason, skips_data=True)
        return False

    def _is_comparison_due(self, is_saving: bool) -> bool:
        every = self.config.replica_check_every_steps
        return every is not None and (is_saving or _is_due(self._step + 1, every))

    def _on_differing_copies(self, differing: dict[str, list[int]]) -> bool:
        """Goes back to weights that all ranks agreed on."""
        ranks = sorted({rank for found in differing.values() for rank in found})
        self._record("replicas_differ", ranks=ranks, parameters=list(differing))
        return self._roll_back(
            f"the weights of rank {' and '.join(map(str, ranks))} differ from those of the others (such as {next(iter(differing))}): "
            "faulty memory, or a fault of the program",
            skips_data=False,
        )

    def _roll_back(self, reason: str, *, skips_data: bool) -> bool:
        """Returns to the newest checkpoint, and with `skips_data` goes on behind the data of this step; whether there was one.

        Raises:
            RunAbortedError: going back did not help several times in a row, or there is nothing to go back to and it must be done.
        """
        self._finish_saving()
        self._clock.switch("checkpoint")
        newest = newest_good_checkpoint(self.run_dir / "checkpoints") or self._resumed_from
        if newest is None:
            if skips_data:
                return False
            raise RunAbortedError(f"step {self._step}: {reason}; there is no checkpoint to go back to, start again")
        if self._rollbacks == self.config.max_skipped_in_a_row:
            raise RunAbortedError(
                f"step {self._step}: {reason}; went back {self._rollbacks} times since the last checkpoint, and it came again"
            )
        self._rollbacks += 1
        at, cursor = self._step, self._cursor
        self.resume(newest)
        if skips_data:
            assert cursor is not None
            self._cursor = self._merged(cursor)
        self._record("rollback", reason=reason, to_step=self._step, from_step=at, skips_data=skips_data)
        logger.warning(
            "step %d: %s; back to step %d%s",
            at,
            reason,
            self._step,
            f", without the data of steps {self._step + 1} to {at}" if skips_data else "",
        )
        if self._reporter is not None:
            self._reporter.resumed(self._step)
        return True

    def _report_evaluation(self) -> bool:
        """Evaluates, unless the run is asked to stop meanwhile, which may not wait for so long; returns whether it came to the end."""
        try:
            result = self.evaluate()
        except _StoppedEvaluationError:
            return False
        self._is_evaluation_due = False
        self._held_out_loss = result.loss
        if self._reporter is not None:
            metrics = {"step": self._step, "split": "validation", "loss": result.loss, "targets": result.targets}
            self._reporter.evaluation({**metrics, **_group_metrics(result.loss_by)})
        return True

    def _go_on_evaluating(self) -> None:
        self._enter("evaluation")
        if self._stops is not None and distributed.all_reduce_sum([float(self._stops.is_stopping)])[0]:
            raise _StoppedEvaluationError

    def _make_up_evaluation(self) -> None:
        """Evaluates the weights that a run was stopped with before it could."""
        if not self._report_evaluation():
            raise self._stop_requested()
        if self._step == self.config.steps:
            self._save(is_ending=True)

    def _stop_requested(self) -> StopRequestedError:
        return StopRequestedError(f"stopped at step {self._step} on request; start the same command again to go on")

    def _save(self, *, is_ending: bool) -> None:
        """Starts to write a checkpoint behind training; at the end of a run, waits for it."""
        self._finish_saving()
        assert self._cursor is not None, "a step was made"
        facts = {
            "tokens": self._tokens,
            "cursor": self._merged(self._cursor),
            "skipped_steps": self._skipped.steps,
            "losses": [] if self._spikes is None else self._spikes.losses,
            EVALUATION_IS_DUE: self._is_evaluation_due,
            **({} if self._held_out_loss is None else {"held_out_loss": self._held_out_loss}),
            **self._facts,
        }
        self._enter("save")
        self._saver.save(take_snapshot(self.backend, step=self._step, facts=facts, average=self._average))
        self._is_save_requested = False
        if is_ending:
            self._finish_saving(is_ending=True)

    def _finish_saving(self, *, is_ending: bool = False) -> None:
        """Waits for the checkpoint in flight, if there is one.

        Raises:
            SaveError: it could not be written, and the run shall stop then or is at its end anyway.
        """
        self._enter("save")
        try:
            report = self._saver.wait()
        except SaveError as error:
            if is_ending or self.config.on_save_error == "stop":
                raise
            self._record("save_failed", reason=str(error))
            logger.warning("step %d: %s; going on, the next checkpoint is tried when it is due", self._step, error)
            return
        if report is not None:
            self._rollbacks = 0
            self._record("checkpoint", **report.as_json())

    def _close_saver(self) -> None:
        self._enter("save")
        self._saver.close()

    def _check_free_space(self) -> None:
        """Refuses to start where two checkpoints do not fit.

        Raises:
            ConfigError: on all ranks.
        """
        num_bytes = checkpoint_bytes(
            self.backend.module.parameters(),
            num_moments=self.config.optimizer.num_moments,
            keeps_average=self._average is not None,
        )
        on_main(lambda: check_free_space(self.run_dir / "checkpoints", num_bytes))

    def _merged(self, cursor: Cursor) -> Cursor:
        return self._train_rows.merge_cursors(distributed.gather_objects(cursor))

    def _enter(self, phase: Phase) -> None:
        self._clock.switch(_PART_OF_PHASE[phase])
        if self._watchdog is not None:
            self._watchdog.enter(phase, self._step)

    def _record(self, event: str, **values: Any) -> None:
        if self._reporter is not None:
            self._reporter.event({"event": event, "step": self._step, **values})


class _StoppedEvaluationError(Exception):
    """Some rank was asked to stop during an evaluation."""


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
        start_processes(config.timeouts.longest_seconds + distributed.TIMEOUT_MARGIN_SECONDS)
    elif distributed.launched_world_size() > 1:
        raise ConfigError(
            f"training.deepspeed: null, but {distributed.launched_world_size()} processes were launched; set training.deepspeed.zero_stage=1"
        )


def make_backend(model: nn.Module, config: TrainingConfig) -> Backend:
    """DeepSpeed where the config has it, else plain PyTorch in one process."""
    if config.deepspeed is not None:
        return DeepSpeedBackend(model, config)
    return SingleProcess(model, config)


def _group_metrics(loss_by: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {"loss_by": loss_by} if loss_by else {}


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0

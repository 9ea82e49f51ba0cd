"""What a run tells while it goes: progress, metrics.jsonl, events.jsonl, TensorBoard, log.txt. docs/metrics.md has every field.

metrics.jsonl has a line for each step and evaluation, and for each resume, behind which steps may come again. events.jsonl has a line for
whatever else happened: checkpoints, skipped steps, spikes, rollbacks. Only the main rank reports.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spade_t5.errors import RunAbortedError
from spade_t5.training.rank_log import LogFile
from spade_t5.training.tensorboard_files import TensorBoardFiles

logger = logging.getLogger("spade_t5")

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
RESUME = "resume"
"""Split of a line of metrics.jsonl that says behind which step a run went on."""
_LONGEST_LINE_BYTES = 2**24


class _Lines:
    """A file of JSON objects, one a line, to which lines are added; a line that a crash cut off is removed first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab+")
        start = max(0, self._file.seek(0, os.SEEK_END) - _LONGEST_LINE_BYTES)
        self._file.seek(start)
        self._file.truncate(start + self._file.read().rfind(b"\n") + 1)
        self.has_content = self._file.seek(0, os.SEEK_END) > 0

    def write(self, values: Mapping[str, Any]) -> None:
        """Adds a line at once; numbers that are not finite become null, as JSON has no word for them."""
        try:
            self._file.write(json.dumps(_with_nulls(values), allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RunAbortedError(
                f"{self._path}: cannot be written ({error.strerror}); make room there and start the same command again"
            ) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written, which was reported then
            self._file.close()


class Curves(Protocol):
    """Something else that shows numbers over the steps."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds a point to every curve."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class Reporter:
    """Writes the metrics of one run and shows its progress."""

    def __init__(
        self, run_dir: Path, *, first_step: int, num_steps: int, log_every_steps: int, curves: Sequence[Curves] = ()
    ) -> None:
        """Opens the files in `run_dir`; steps before `first_step` were done by an earlier attempt.

        Args:
            run_dir: folder of the run.
            first_step: of this process.
            num_steps: of the whole run.
            log_every_steps: steps between lines of the log.
            curves: what else shows the numbers, besides TensorBoard.
        """
        self._run_dir = run_dir
        self._num_steps = num_steps
        self._log_every_steps = log_every_steps
        self._metrics = _Lines(run_dir / METRICS_FILE)
        self._events = _Lines(run_dir / EVENTS_FILE)
        self._curves: list[Curves] = [TensorBoardFiles(run_dir / "tensorboard"), *curves]
        self._log_file = LogFile(run_dir / "log.txt")
        logger.addHandler(self._log_file)
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=first_step - 1)
        self._first_step = first_step
        self._steps_made = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """Shows the progress bar."""
        if self._metrics.has_content or self._first_step > 1:
            self.resumed(self._first_step - 1)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self._progress.stop()
        self._metrics.close()
        self._events.close()
        for curves in self._curves:
            curves.close()
        logger.removeHandler(self._log_file)
        self._log_file.close()

    def record(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl; numbers also become points of curves `<split>/<name>`, those of mappings with one name for each level."""
        self._metrics.write(metrics)
        numbers = dict(_scalars(metrics, metrics["split"]))
        for curves in self._curves:
            curves.add(numbers, metrics["step"])

    def event(self, values: dict[str, Any]) -> None:
        """One line of events.jsonl."""
        self._events.write({"time": time.time(), **values})

    def resumed(self, step: int) -> None:
        """Marks that training goes on behind `step`, so that what comes after it replaces what came before."""
        self._metrics.write({"split": RESUME, "step": step})
        self.event({"event": RESUME, "step": step})

    def train_step(self, metrics: dict[str, Any]) -> None:
        """Records a training step, and every so often says so."""
        self.record(metrics)
        self._steps_made += 1  # a rollback may lead behind the first one, and takes none of them back
        step = metrics["step"]
        text = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            text += f", MFU {metrics['mfu']:.1%}"
        self._progress.update(self._task, completed=step, description=text)
        if step % self._log_every_steps == 0 or step == self._num_steps:
            seconds = (time.monotonic() - self._started) / self._steps_made * (self._num_steps - step)
            if "ranks" in metrics:
                text += f", {_slowest(metrics['ranks'])}"
            logger.info(
                "step %d/%d: %s, lr %.3g, ETA %s", step, self._num_steps, text, metrics["lr"], _duration(seconds)
            )

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Records an evaluation."""
        self.record(metrics)
        logger.info("step %d: held-out loss %.4f over %d targets", metrics["step"], metrics["loss"], metrics["targets"])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run, in order; where steps were done again after a resume, their last attempt."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for metrics in read_lines(run_dir / METRICS_FILE):
        if metrics["split"] == RESUME:
            lines = {key: line for key, line in lines.items() if line["step"] <= metrics["step"]}
        else:
            lines[metrics["split"], metrics["step"]] = metrics
    return sorted(lines.values(), key=lambda metrics: metrics["step"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or events.jsonl as they were written, but for one that was cut off at its end, and broken ones."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = [_parsed(line) for line in lines]
    if num_broken := found.count(None):
        logger.warning("%s: %d of %d lines are no JSON objects and are left out", path, num_broken, len(lines))
    return [values for values in found if values is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None for what a power cut or a failing disk made of it."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_nulls(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(metrics: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}/{name}", value


def _slowest(ranks: Mapping[str, Any]) -> str:
    own = ranks["own_seconds"]
    return (
        f"slowest rank {ranks['slowest_rank']} ({ranks['slowest_host']}): {own['max']:.3g} s of its own work in a step, "
        f"median {own['median']:.3g} s"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

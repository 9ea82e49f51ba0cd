"""Records some steps with torch.profiler, one trace file a rank, to be opened in Perfetto or chrome://tracing.

Profiled steps compute what they would anyway; they take longer, so their times and rates are those of profiled steps. The trace is written
between steps.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from spade_t5.training import distributed

logger = logging.getLogger("spade_t5")

PROFILE_FOLDER = "profile"
_SNAPSHOT_ENTRIES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Which steps are recorded, and what of them."""

    first_step: int
    """The first recorded step; choose one behind the first few, in which kernels are compiled and memory is allotted."""
    num_steps: int = 3
    """Recorded steps; a trace takes 10 to 100 MB of memory for each, and a tenth of that on disk."""
    ranks: tuple[int, ...] | None = (0,)
    """Ranks that record; null: all."""
    record_shapes: bool = False
    """Note the shapes of every operation's inputs."""
    with_stack: bool = False
    """Note where in the program every operation is called; slows steps down several times."""
    memory_snapshot: bool = False
    """On GPUs, also write every allocation of these steps, for https://pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("first_step", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.ranks is not None and any(rank < 0 for rank in self.ranks):
            raise ValueError(f"ranks: {list(self.ranks)} must be numbers from 0, or null for all")


class StepProfiler:
    """Records the configured steps of this rank."""

    def __init__(self, config: ProfileConfig | None, run_dir: Path) -> None:
        """Writes to `run_dir/profile/`; without a config nothing is recorded."""
        is_chosen = config is not None and (config.ranks is None or distributed.rank() in config.ranks)
        self._steps = range(0) if config is None else range(config.first_step, config.first_step + config.num_steps)
        self._config = config if is_chosen else None
        self._folder = run_dir / PROFILE_FOLDER
        self._profile: Any = None
        self._first_step = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context of a step, from its rows to its update."""
        if self._config is None or number not in self._steps:
            yield
            return
        if self._profile is None:
            self._begin(self._config, number)
        with torch.profiler.record_function(f"step {number}"):
            yield

    def is_due(self, step: int, *, is_going_back: bool = False) -> bool:
        """Whether ranks have to write what they recorded behind a step, the same on all ranks: the last one, or any that ends in a rollback."""
        return step in self._steps and (is_going_back or step == self._steps[-1])

    def close(self, step: int) -> None:
        """Writes what this rank recorded up to a step, if it did."""
        self._end(step)

    def _begin(self, config: ProfileConfig, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            if config.memory_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._profile = profile(activities=activities, record_shapes=config.record_shapes, with_stack=config.with_stack)
        self._first_step = step
        self._profile.start()

    def _end(self, last_step: int) -> None:
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        name = f"steps-{self._first_step}-{last_step}.rank-{distributed.rank():05d}"
        self._write(f"{name}.trace.json.gz", finished.export_chrome_trace)
        if self._config is not None and self._config.memory_snapshot and torch.cuda.is_available():
            self._write(f"{name}.memory.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, write: Callable[[str], Any]) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(exist_ok=True)
            write(str(path))
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            logger.warning("%s: cannot be written (%s): there is no profile of these steps", path, reason)
        else:
            logger.info("profile: wrote %s", path)

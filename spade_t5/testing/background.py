"""A launcher that runs in the background of a test, and is waited for by what its run shows."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from spade_t5.testing.runs import attempts


class BackgroundLaunch(ABC):
    """Base of launchers that tests start in one way or another; `run_dir` is their run's folder, `log` what they write to standard error."""

    def __init__(self, run_dir: Path) -> None:
        """Names the files; the subclass starts the launcher."""
        self.run_dir = run_dir
        self.log = run_dir.parent / f"{run_dir.name}.err"

    @abstractmethod
    def wait(self, seconds: float = 240) -> int:
        """Waits for its end and returns its exit code."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether it has not ended."""

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        return self.log.read_text()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for something that must come while the launcher runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.is_running(), self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.02)

    def wait_for_steps(self, count: int) -> None:
        """Until so many steps were made, redone ones counted as well."""
        self.wait_until(lambda: len(attempts(self.run_dir)) >= count)

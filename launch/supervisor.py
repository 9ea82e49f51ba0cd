"""Keeps ranks running: starts them, starts them again after a fault, stops them in an orderly way, and says how they ended.

Whether ranks start again is decided here, for torchrun knows neither exit codes nor checkpoints. How they are started, on this machine or on
many, is the business of an `attempt`.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spade_t5.checkpoint import list_checkpoints
from spade_t5.errors import ConfigError
from spade_t5.launch.cli import EXIT_FAULT, EXIT_USER_ERROR
from spade_t5.launch.ending import Ending
from spade_t5.launch.group import remove_left_folders
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.terminal import say
from spade_t5.training.shared_folder import make_folder, remove_empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervision:
    """How a run is watched over."""

    run_dir: Path | None
    """Folder of the run, in which new checkpoints show that it gets on; None for what is no run, and is started once."""
    logs: Path
    """Folder in which each launch makes one of its own for the ranks' output."""
    max_restarts: int
    """Starts after a fault without a new checkpoint in between."""
    keeps_logs: bool = True
    """Whether the ranks' output stays where all went well."""


Attempt = Callable[[int, Path], Ending]
"""Starts all ranks and waits for their end; given the number of starts before and the folder of their output."""


def supervise(supervision: Supervision, attempt: Attempt, stop: LauncherStop) -> int:
    """Runs the ranks to their end, over faults, and returns the exit code; what happened is written to the standard error.

    Args:
        supervision: what is watched over.
        attempt: one start.
        stop: what this process was asked to do; entered by the caller.

    Raises:
        ConfigError: the folder of the run or of the ranks' output cannot be made.
    """
    if supervision.run_dir is None:
        return _run_once(supervision, attempt)
    made = make_folder(supervision.run_dir)
    code = EXIT_USER_ERROR
    try:
        code = _supervise(supervision, supervision.run_dir, attempt, stop)
    finally:
        if code == EXIT_USER_ERROR:  # a refused run leaves nothing behind
            remove_empty([supervision.logs])
            remove_empty(made)
    return code


def _run_once(supervision: Supervision, attempt: Attempt) -> int:
    remove_left_folders()
    logs = _make_logs(supervision.logs)
    ending = attempt(0, logs)
    if ending.message:
        say(ending.message)
    if not supervision.keeps_logs and (ending.code != EXIT_FAULT or not ending.message):
        shutil.rmtree(logs, ignore_errors=True)
    return ending.code


def _supervise(supervision: Supervision, run_dir: Path, attempt: Attempt, stop: LauncherStop) -> int:
    restarts = 0
    remove_left_folders()
    logs = _make_logs(supervision.logs)
    run_folder = _identity(run_dir)
    for number in itertools.count():
        newest = newest_checkpoint(run_dir)
        ending = attempt(number, logs)
        if ending.message:
            say(ending.message)
        if ending.code == EXIT_USER_ERROR and number == 0:  # a refused run leaves its folder as it was
            shutil.rmtree(logs, ignore_errors=True)
        if ending.code != EXIT_FAULT or ending.is_final or stop.is_requested:
            return ending.code
        newest_now = newest_checkpoint(run_dir)
        if _identity(run_dir) != run_folder or (newest is not None and newest_now is None):
            say(
                f"the run folder or its checkpoints are gone: {run_dir}; see what removed them, nothing is started again"
            )
            return EXIT_FAULT
        restarts = 0 if newest_now != newest else restarts
        if restarts == supervision.max_restarts:
            say(f"giving up after --max-restarts {restarts} without a new checkpoint; the logs are in {logs}")
            return EXIT_FAULT
        restarts += 1
        say(f"starting again, {restarts} of {supervision.max_restarts} without a new checkpoint")
    raise AssertionError("the loop ends by returning")


def _make_logs(logs: Path) -> Path:
    """Makes the folder of this launch's logs, which it shares with no other."""
    folder = logs / f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.uname().nodename}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--log-dir: {folder} cannot be made ({error.strerror}); choose another folder") from None
    return folder


def _identity(folder: Path) -> int | None:
    """A number that a folder made anew under the same name does not have; None if it is gone."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def newest_checkpoint(run_dir: Path | None) -> str | None:
    """Name of a run folder's newest checkpoint; None if there is none, or no folder."""
    checkpoints = [] if run_dir is None else list_checkpoints(run_dir / "checkpoints")
    return checkpoints[-1].name if checkpoints else None

"""Asks a run that is going on for a checkpoint, from another process, through a file in the run folder."""

import logging
import time
from pathlib import Path

from spade_t5.checkpoint.folder import list_checkpoints, list_unfinished
from spade_t5.checkpoint.manifest import create
from spade_t5.errors import ConfigError, DataError
from spade_t5.training.lease import LEASE_FILE, Holder

logger = logging.getLogger("spade_t5")

REQUEST_FILE = "checkpoint-requested"
POLL_SECONDS = 0.5


def request_checkpoint(run_dir: Path) -> None:
    """Asks the run in a folder to save at the end of its current step.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        create(run_dir / REQUEST_FILE).close()
    except FileExistsError:
        pass  # somebody else has asked already
    except OSError as error:
        raise ConfigError(
            f"--now: {run_dir / REQUEST_FILE} cannot be made ({error.strerror}); run as the owner of the run folder"
        ) from None


def take_request(run_dir: Path) -> bool:
    """Whether a checkpoint was asked for since the last call (main rank only)."""
    try:
        (run_dir / REQUEST_FILE).unlink()
    except (
        OSError
    ):  # none there; or it cannot be taken away, and saving at every step would be worse than not answering
        return False
    return True


def checkpoint_now(run_dir: Path, *, timeout_seconds: float) -> Path:
    """Asks for a checkpoint and waits until it is published.

    Raises:
        ConfigError: no run is going on in the folder, or it cannot be written.
        DataError: the run has ended or time is up before a checkpoint came.
    """
    folder = run_dir / "checkpoints"
    if not _is_running(run_dir):
        raise ConfigError(f"--now: no run is going on in {run_dir}; leave --now out to export its newest checkpoint")
    before = {path.name for path in (*list_checkpoints(folder), *list_unfinished(folder))}
    request_checkpoint(run_dir)
    logger.info("asked the run in %s for a checkpoint", run_dir)
    until = time.monotonic() + timeout_seconds
    try:
        while time.monotonic() < until:
            is_running = _is_running(run_dir)
            fresh = [path for path in list_checkpoints(folder) if path.name not in before]
            if fresh:
                return fresh[-1]
            if not is_running:
                raise DataError(
                    f"--now: the run in {run_dir} ended before it saved; leave --now out to export its newest checkpoint"
                )
            time.sleep(POLL_SECONDS)
    finally:
        take_request(run_dir)
    raise DataError(f"--now: no checkpoint came within {timeout_seconds:.0f} s; see the log of the run in {run_dir}")


def _is_running(run_dir: Path) -> bool:
    """Whether a process holds the lease; on other machines, whether one did when it last looked."""
    try:
        holder = Holder.parse((run_dir / LEASE_FILE).read_bytes())
    except OSError:
        return False
    return holder is None or not holder.is_on_this_machine or holder.is_alive is not False

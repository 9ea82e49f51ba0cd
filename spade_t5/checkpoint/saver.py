"""Writes checkpoints behind the training: one at a time, in a thread of each rank.

A save goes through three stages, after each of which the ranks tell each other how it went over a group of their own:

    the main rank makes a hidden folder; each rank writes its file, forces it to disk and reads it back; the main rank writes
    `state.json` and the manifest, renames the folder, and deletes what retention does not keep.

The name `step-00000100` thus appears only over a checkpoint that is whole, on disk, and reads as it was written.
"""

import errno
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from spade_t5.checkpoint.folder import STARTED, checkpoint_path, hidden_path
from spade_t5.checkpoint.manifest import FOLDER_MODE, write_manifest, write_small
from spade_t5.checkpoint.retention import Retention
from spade_t5.checkpoint.snapshot import Snapshot, take_snapshot
from spade_t5.checkpoint.state import HELD_OUT_LOSS, STATE_FILE
from spade_t5.checkpoint.writing import WrittenPart, make_empty, put_in_place, read_back, state_content, write_own_files
from spade_t5.errors import RunAbortedError, SaveError
from spade_t5.training import distributed
from spade_t5.training.backend import Backend

logger = logging.getLogger("spade_t5")

SMALL_FILES_BYTES = 64 << 10
"""About what `state.json`, the manifest, headers and the unused ends of blocks take."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveReport:
    """What a save took; times are those of the rank that they are longest for."""

    path: Path
    """The checkpoint."""
    step: int
    """Number of finished steps."""
    num_bytes: int
    """Size of all files of tensors."""
    blocked_seconds: float
    """For which training waited."""
    write_seconds: float
    """From handing over the snapshot until the checkpoint was published."""
    hash_seconds: float
    """Part of it in which tensors were hashed and looked at."""
    sync_seconds: float
    """Part of it in which files were forced to disk."""
    read_back_seconds: float
    """Part of it in which files were read back and hashed."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "path": str(self.path)}


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time."""

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        before_publishing: Callable[[], dict[str, Any]] | None = None,
        timeout_seconds: float = 1800,
    ) -> None:
        """Makes the folder and the ranks' own group (a collective call).

        Args:
            folder: the run's `checkpoints` folder, visible to all ranks.
            retention: which checkpoints are kept.
            before_publishing: called on the main rank just before the manifest is written; returns facts for the manifest, or raises
                to forbid the checkpoint.
            timeout_seconds: how long ranks wait for each other while they write.

        Raises:
            SaveError: the folder cannot be made; on all ranks.
        """
        self._folder = folder
        self._retention = retention
        self._before_publishing = before_publishing
        self._timeout_seconds = timeout_seconds
        self._group = _new_group(timeout_seconds)
        self._thread: threading.Thread | None = None
        self._outcome: SaveReport | RunAbortedError | None = None
        self._agree("checkpoints cannot be written", self._make_folder)

    def save(self, snapshot: Snapshot) -> None:
        """Hands a snapshot to the writer thread.

        Raises:
            RuntimeError: a save is in flight; `wait` for it first.
        """
        if self._thread is not None:
            raise RuntimeError(f"a save is in flight, that of step {snapshot.step} cannot begin; wait() first")
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def is_finished(self) -> bool:
        """Whether this rank's writer has ended, well or not, and `wait` was not called since."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> SaveReport | None:
        """Waits until the save in flight has ended (a collective call); None if there is none.

        Raises:
            SaveError: a rank could not write; on all ranks. What was written is removed, and the saver may be used again.
            RunAbortedError: publishing was forbidden, on all ranks; or the ranks lost each other, of which a rank may know
                nothing. Their group is of no use any more, and no save will go well: the run must end.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, RunAbortedError):
            raise outcome
        assert outcome is not None, "the writer leaves a report or an error"
        return outcome

    def close(self) -> None:
        """Lets a save in flight end, well or not, and leaves the group; for the end of a run and the way out of an exception."""
        if self._thread is not None:
            self._thread.join(self._timeout_seconds)
            if self._thread.is_alive():
                return  # it holds the group
            if isinstance(self._outcome, RunAbortedError):
                logger.warning("%s", self._outcome)
            self._thread, self._outcome = None, None
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._outcome = self._write(snapshot)
        except RunAbortedError as error:
            self._outcome = error

    def _write(self, snapshot: Snapshot) -> SaveReport:
        started = time.perf_counter()
        final = checkpoint_path(self._folder, snapshot.step)
        temporary = hidden_path(final, "tmp")
        name = f"the checkpoint of step {snapshot.step}"
        what = f"{name} was not written"

        def publish() -> float:
            self._publish(temporary, final, snapshot, parts)
            return time.perf_counter() - started

        try:
            needed = sum(self._agree(what, lambda: _begin(temporary, snapshot)))
            parts = self._agree(what, lambda: write_own_files(temporary, snapshot), needed)
            seconds = self._agree(what, publish, needed, if_lost=f"{name} may or may not have been written")
        except RunAbortedError:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return SaveReport(
            path=final,
            step=snapshot.step,
            num_bytes=needed,
            blocked_seconds=max(part.blocked_seconds for part in parts),
            write_seconds=max(seconds),
            hash_seconds=max(part.hash_seconds for part in parts),
            sync_seconds=max(part.sync_seconds for part in parts),
            read_back_seconds=max(part.read_back_seconds for part in parts),
        )

    def _publish(self, temporary: Path, final: Path, snapshot: Snapshot, parts: list[WrittenPart]) -> None:
        """Writes `state.json` and the manifest and gives the folder its name, on the main rank."""
        if not distributed.is_main():
            return
        entries = {name: entry for part in parts for name, entry in part.entries.items()}
        state = json.dumps(state_content(snapshot, parts), allow_nan=False).encode()
        entries[STATE_FILE] = write_small(temporary / STATE_FILE, state)
        read_back(temporary / STATE_FILE, entries[STATE_FILE])
        loss = snapshot.facts.get(HELD_OUT_LOSS)
        facts = {"kind": "checkpoint", "step": snapshot.step} | ({} if loss is None else {HELD_OUT_LOSS: loss})
        if self._before_publishing is not None:
            facts |= self._before_publishing()
        write_manifest(temporary, entries, **facts)
        (temporary / STARTED).unlink()
        put_in_place(temporary, final)
        self._retention.apply(self._folder, final)

    def _make_folder(self) -> None:
        if distributed.is_main():
            self._folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)

    def _agree(
        self, what: str, action: Callable[[], T], needed_bytes: int | None = None, *, if_lost: str | None = None
    ) -> list[T]:
        """Does this rank's part of a stage, and returns what all ranks' parts returned, or raises on all of them.

        Args:
            what: what did not happen if a rank's part fails.
            action: this rank's part.
            needed_bytes: how much space all ranks need, for the message of a full disk.
            if_lost: what is to be said if the ranks lose each other; `what` by default.

        Raises:
            SaveError: a rank's part failed.
            RunAbortedError: a rank's part was forbidden, or the ranks lost each other. A gloo group that lost a message stays
                broken, and a rank that did not answer cannot be asked to make another: that is the end of the run.
        """
        value, problem = None, None
        try:
            value = action()
        except RunAbortedError as error:
            problem = _Problem(str(error), is_forbidden=True)
        except Exception as error:
            if not isinstance(error, (OSError, ValueError)):
                logger.exception("a fault of the program in the writer of checkpoints")
            problem = _Problem(f"{what}: {self._reason(error, needed_bytes)}; earlier checkpoints are as they were")
        try:
            answers = _gather((value, problem), self._group)
        except RuntimeError as error:
            said = f"{if_lost or what}: " if problem is None else f"{problem.message}; and "
            raise RunAbortedError(
                f"{said}the ranks lost each other ({error}); see their logs and start the same command again"
            ) from None
        for _, found in answers:
            if found is not None:
                raise RunAbortedError(found.message) if found.is_forbidden else SaveError(found.message)
        return [value for value, _ in answers]  # type: ignore[misc]

    def _reason(self, error: Exception, needed_bytes: int | None) -> str:
        if not isinstance(error, OSError):
            return str(error)
        text = f"{error.filename or self._folder}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and needed_bytes is not None:
            needed_bytes += SMALL_FILES_BYTES
            text += f", the checkpoint needs {needed_bytes:,} bytes, {_free_bytes(self._folder):,} are free; free space"
        return text


def save_checkpoint(folder: Path, backend: Backend, *, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step` and waits for it (a collective call); removes the oldest ones beyond `keep`.

    Args:
        folder: the run's `checkpoints` folder, visible to all ranks.
        backend: owner of the weights and of the optimizer.
        step: number of finished steps.
        facts: further JSON values for `state.json`.
        keep: number of newest checkpoints that stay.

    Returns:
        the published folder.

    Raises:
        SaveError: a rank could not write; on all ranks.
    """
    saver = CheckpointSaver(folder, Retention(keep_last=keep))
    try:
        saver.save(take_snapshot(backend, step=step, facts=facts))
        report = saver.wait()
    finally:
        saver.close()
    assert report is not None
    return report.path


class _Problem(NamedTuple):
    message: str
    is_forbidden: bool = False


def _begin(temporary: Path, snapshot: Snapshot) -> int:
    """Makes the hidden folder, on the main rank; returns how many bytes this rank will write."""
    if distributed.is_main():
        make_empty(temporary)
    return snapshot.num_bytes


def _free_bytes(folder: Path) -> int:
    """Free space, counting what unfinished checkpoints take, which goes before the next one."""
    unfinished = sum(path.stat().st_blocks * 512 for path in folder.glob(".step-*.tmp/*"))
    return shutil.disk_usage(folder).free + unfinished


def _new_group(timeout_seconds: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, so that writers do not mix their messages with those of the training."""
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))


def _gather(item: T, group: dist.ProcessGroup | None) -> list[T]:
    """`item` of every rank, in rank order."""
    if group is None:
        return [item]
    items = [item] * distributed.world_size()
    dist.all_gather_object(items, item, group=group)
    return items

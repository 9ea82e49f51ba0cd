"""The files of a checkpoint, as the ranks write them, and the rename that makes them one.

Every file is forced to disk and then read back and compared with the hash of what was in memory.
"""

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade_t5.checkpoint.folder import STARTED, hidden_path
from spade_t5.checkpoint.manifest import FOLDER_MODE, create, file_sha256, publish
from spade_t5.checkpoint.snapshot import Index, Snapshot
from spade_t5.checkpoint.state import FORMAT_VERSION
from spade_t5.checkpoint.tensor_file import write_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenPart:
    """What a rank wrote."""

    entries: dict[str, dict[str, Any]]
    index: Index
    whole: dict[str, dict[str, str]]
    scalars: dict[str, dict[str, float]]
    blocked_seconds: float
    hash_seconds: float
    sync_seconds: float
    read_back_seconds: float


def write_own_files(folder: Path, snapshot: Snapshot) -> WrittenPart:
    """Writes this rank's files and reads them back.

    Raises:
        OSError: they cannot be written, or read back different.
        ValueError: a tensor holds a number that is not finite.
    """
    entries = {}
    hash_seconds = sync_seconds = 0.0
    for name, tensors in snapshot.files.items():
        written = write_tensors(folder / name, tensors)
        entries[name] = written.entry
        hash_seconds += written.hash_seconds
        sync_seconds += written.sync_seconds
    started = time.perf_counter()
    for name, entry in entries.items():
        read_back(folder / name, entry)
    return WrittenPart(
        entries=entries,
        index=snapshot.index,
        whole=snapshot.whole,
        scalars=snapshot.scalars,
        blocked_seconds=snapshot.seconds,
        hash_seconds=hash_seconds,
        sync_seconds=sync_seconds,
        read_back_seconds=time.perf_counter() - started,
    )


def read_back(path: Path, entry: dict[str, Any]) -> None:
    """Compares what the disk holds with what was in memory.

    Raises:
        OSError: it differs.
    """
    _forget_cached(path)
    if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
        raise OSError(errno.EIO, "reads back different from what was written", str(path))


def _forget_cached(path: Path) -> None:
    """Asks the kernel to drop its copy of a file, so that the next read comes from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def state_content(snapshot: Snapshot, parts: list[WrittenPart]) -> dict[str, Any]:
    """Content of `state.json`, from what all ranks wrote."""
    index: Index = {}
    scalars: dict[str, dict[str, float]] = {}
    for part in parts:
        for key, names in part.index.items():
            for name, pieces in names.items():
                index.setdefault(key, {}).setdefault(name, []).extend(pieces)
        for key, values in part.scalars.items():
            scalars.setdefault(key, {}).update(values)
    return {
        "format_version": FORMAT_VERSION,
        "step": snapshot.step,
        **snapshot.facts,
        "shapes": snapshot.shapes,
        "scalars": scalars,
        "whole": parts[0].whole,
        "index": index,
    }


def make_empty(folder: Path) -> None:
    """Makes the folder of an unfinished checkpoint anew, with a note of when it began."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(FOLDER_MODE)
    create(folder / STARTED).close()


def put_in_place(temporary: Path, final: Path) -> None:
    """Publishes a folder; one that has the name already keeps it if that fails, and at no time is neither on disk."""
    replaced = hidden_path(final, "replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.rename(final, replaced)
    try:
        publish(temporary, final)
    except BaseException:
        if final.exists():
            os.rename(final, temporary)  # it has its name, but perhaps not on disk
        if replaced.exists():
            os.rename(replaced, final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)

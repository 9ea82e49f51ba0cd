"""Which checkpoints a run folder holds, and what else may lie beside them.

step-00000100              published: whole, and on disk
.step-00000100.tmp         being written, or cut off
.step-00000100.replaced    one of the same step, until its successor has its place
.step-00000100.deleted     being deleted
step-00000100.abandoned    newer than the checkpoint that a run went on from; kept, but never resumed from

Publishing is one rename; what a kill leaves hidden is cleared up at the next start.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from spade_t5.checkpoint.manifest import MANIFEST, read_manifest, sync
from spade_t5.errors import ConfigError, DataError

logger = logging.getLogger("spade_t5")

NAME = re.compile(r"step-(\d{8,})")
HIDDEN_NAME = re.compile(r"\.(step-\d{8,})\.(tmp|replaced|deleted)")
STARTED = ".started"
"""An empty file in an unfinished checkpoint, as old as the save."""
CHECKPOINTS_BEFORE_START = 2
"""A folder needs room for so many, those that it holds included: one is kept while the next is written."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step that a folder's name stands for; None if it is not the name of a checkpoint."""
    match = NAME.fullmatch(path.name)
    step = int(match[1]) if match else None
    return step if step is not None and checkpoint_path(path.parent, step).name == path.name else None


def hidden_path(final: Path, state: str) -> Path:
    """Where a checkpoint lies while it is not published: `state` is tmp, replaced or deleted."""
    return final.with_name(f".{final.name}.{state}")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Everything with the name of a checkpoint, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found)]


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; hidden folders of unfinished saves are not among them."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).exists()]


def list_unfinished(folder: Path) -> list[Path]:
    """Where the checkpoints that are being written, or were cut off, will or would have been."""
    return [path.with_name(path.name[1 : -len(".tmp")]) for path in _hidden(folder, "tmp")]


def latest_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint whose manifest can be read, or that of `step`; None if there is none."""
    for path in reversed(list_checkpoints(folder)):
        if step is not None and path != checkpoint_path(folder, step):
            continue
        try:
            read_manifest(path)
        except DataError:
            continue
        return path
    return None


def remove_unfinished(folder: Path) -> None:
    """Clears up what a killed run left half done: unfinished checkpoints and deletions (main rank only)."""
    restore_replaced(folder)
    for path in _hidden(folder, "tmp"):
        logger.warning(
            "%s: removed, the save was cut off%s; if that was while the run was being stopped, give it a longer grace",
            path,
            _duration_of_save(path),
        )
        shutil.rmtree(path, ignore_errors=True)
    for path in _hidden(folder, "deleted"):
        shutil.rmtree(path, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Gives a checkpoint its name back whose successor was to take its place and did not (main rank only)."""
    for path in _hidden(folder, "replaced"):
        match = HIDDEN_NAME.fullmatch(path.name)
        assert match is not None
        final = folder / match[1]
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, final)
            sync(folder)


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Renames checkpoints beyond `step` so that no later resume picks them (main rank only).

    The newest goes first: cut off at any point, the newest one left is as old as it can be, and the next start goes on from the same
    lineage or sets aside the rest.

    Returns:
        their new names, newest first.
    """
    moved = []
    for path in reversed(checkpoint_folders(folder)):
        number = checkpoint_step(path)
        if number is not None and number > step:
            target, count = path.with_name(f"{path.name}.abandoned"), 1
            while target.exists():
                count += 1
                target = path.with_name(f"{path.name}.abandoned.{count}")
            os.rename(path, target)
            sync(folder)
            logger.warning("%s: set aside as %s, the run goes on from step %d", path, target.name, step)
            moved.append(target)
    return moved


def delete_checkpoint(path: Path) -> None:
    """Removes a checkpoint; cut off at any point, it leaves nothing that looks like one.

    Raises:
        OSError: it cannot be removed.
    """
    hidden = hidden_path(path, "deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    sync(path.parent)
    shutil.rmtree(hidden)


def check_free_space(folder: Path, checkpoint_bytes: int) -> None:
    """Refuses to start where two checkpoints would not fit, or one beside those that are there (main rank only).

    Raises:
        ConfigError: there is less room; the message has needed and free bytes.
    """
    count = max(1, CHECKPOINTS_BEFORE_START - len(list_checkpoints(folder)))
    needed = count * checkpoint_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run_dir: {folder} has {free:,} bytes free, the next {count} checkpoints need {needed:,}; free space or choose another folder"
        )


def _hidden(folder: Path, state: str) -> list[Path]:
    found = folder.glob(f".step-*.{state}")
    return sorted(path for path in found if HIDDEN_NAME.fullmatch(path.name) and not path.is_symlink())


def _duration_of_save(temporary: Path) -> str:
    """How long an unfinished save had been going on when it last wrote something."""
    try:
        started = (temporary / STARTED).stat().st_mtime
        last = max(path.stat().st_mtime for path in temporary.iterdir())
    except (OSError, ValueError):
        return ""
    return f" after {last - started:.1f} s"

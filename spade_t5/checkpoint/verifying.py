"""Decides whether a checkpoint is what was written, and steps back to the newest one that is.

A checkpoint is good when its manifest matches its own hash, every file has the size and hash of the manifest and is a plain file, there is
no further file (names that begin with a dot do not count), and `state.json` makes sense.
"""

import logging
import os
from pathlib import Path
from typing import Any

from spade_t5.checkpoint.folder import checkpoint_folders, checkpoint_step, restore_replaced
from spade_t5.checkpoint.manifest import MANIFEST, check_file, read_manifest
from spade_t5.checkpoint.state import STATE_FILE, read_state
from spade_t5.errors import DataError
from spade_t5.training import distributed

logger = logging.getLogger("spade_t5")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
        DataError: a file is missing, damaged, or too many.
    """
    manifest = _checked_manifest(path)
    for name, entry in manifest["files"].items():
        check_file(path, name, entry)
    read_state(path)
    return manifest


def verify_together(path: Path) -> None:
    """As `verify_checkpoint`, a collective call: file i is hashed by rank i modulo their number.

    Raises:
        DataError: a file is missing, damaged, or too many; on all ranks.
    """
    problem = None
    try:
        files = list(_checked_manifest(path)["files"].items())
        for name, entry in files[distributed.rank() :: distributed.world_size()]:
            check_file(path, name, entry)
        if distributed.is_main():
            read_state(path)
    except DataError as error:
        problem = str(error)
    problems = [found for found in distributed.gather_objects(problem) if found is not None]
    if problems:
        raise DataError(problems[0])


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is good, None if there are none at all (a collective call).

    Every one that is rejected is named in the log, with the file and the reason. Checkpoints that belong neither to this user nor to the
    owner of the run folder are rejected: somebody else put them there.

    Raises:
        DataError: there are checkpoints, and none is good; on all ranks.
    """
    rejected = []
    for path in reversed(_candidates(folder)):
        try:
            _check_owner_together(path)
            verify_together(path)
        except DataError as error:
            logger.warning("rejected %s: %s", path.name, error)
            rejected.append(str(error))
            continue
        if rejected:
            logger.warning("going back to %s, the newest good checkpoint", path)
        return path
    if rejected:
        raise DataError(
            f"{folder}: holds {len(rejected)} checkpoints and none is good, the newest: {rejected[0]}; "
            "restore one of them, or start anew in another run_dir"
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    """The main rank's view of the folder, for all."""
    found: list[Path] = []
    if distributed.is_main():
        restore_replaced(folder)
        found = checkpoint_folders(folder)
    return distributed.gather_objects(found)[0]


def _check_owner_together(path: Path) -> None:
    problem = None
    if distributed.is_main():
        try:
            _check_owner(path)
        except DataError as error:
            problem = str(error)
    problem = distributed.gather_objects(problem)[0]
    if problem is not None:
        raise DataError(problem)


def _check_owner(path: Path) -> None:
    """The checkpoint and its files must be plain ones, of this user or of the owner of the run folder."""
    try:
        trusted = {os.geteuid(), path.parent.parent.stat().st_uid}
        for each in (path, *path.iterdir()):
            owner = each.lstat().st_uid
            if owner not in trusted:
                raise DataError(
                    f"{each}: belongs to user {owner}, neither to you nor to the owner of the run folder; "
                    "refused, name it with --resume if you trust it"
                )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest, held against the name of the folder and the files in it."""
    if path.is_symlink():
        raise DataError(f"{path}: is a link, not a folder; refused")
    manifest = read_manifest(path)
    step = checkpoint_step(path)
    if step is not None and manifest.get("step") != step:
        raise DataError(
            f"{path / MANIFEST}: is that of step {manifest.get('step')}; the folder was renamed, use another one"
        )
    if STATE_FILE not in manifest["files"]:
        raise DataError(f"{path / MANIFEST}: does not list {STATE_FILE}; it is not that of a checkpoint")
    known = {MANIFEST, *manifest["files"]}
    for name in sorted(each.name for each in path.iterdir()):
        if name not in known and not name.startswith("."):
            raise DataError(f"{path / name}: is not in the manifest; it does not belong there, remove it")
    return manifest

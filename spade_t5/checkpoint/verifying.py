"""Decides whether a checkpoint is what was written, and steps back to the newest one that is.

A checkpoint is good when its manifest matches its own hash, every file has the size and hash of the manifest and is a plain file, there is
no further file (names that begin with a dot do not count), and `state.json`, the manifest and the headers of the other files agree.
"""

import functools
import logging
import os
from pathlib import Path
from typing import Any

from spade_t5.checkpoint.folder import checkpoint_folders, checkpoint_step
from spade_t5.checkpoint.manifest import MANIFEST, check_file, read_manifest
from spade_t5.checkpoint.state import FROZEN_FILE, STATE_FILE, files_of, read_state, tensors_of
from spade_t5.checkpoint.tensor_file import TensorFile
from spade_t5.errors import DataError
from spade_t5.messages import printable, shown
from spade_t5.training import distributed
from spade_t5.training.agreement import on_every_rank, on_main

logger = logging.getLogger("spade_t5")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
        DataError: a file is missing, damaged, or too many, or what the files say does not fit together.
    """
    manifest = _checked_manifest(path)
    for name, entry in manifest["files"].items():
        check_file(path, name, entry)
    state = _checked_state(path, manifest)
    for name in manifest["files"]:
        _check_tensors(path, name, state)
    return manifest


def verify_together(path: Path) -> None:
    """As `verify_checkpoint`, a collective call: file i is read by rank i modulo their number.

    Raises:
        DataError: a file is missing, damaged, or too many, or what the files say does not fit together; on all ranks.
    """
    on_every_rank(lambda: _verify_share(path))


def _verify_share(path: Path) -> None:
    manifest = _checked_manifest(path)
    own = list(manifest["files"])[distributed.rank() :: distributed.world_size()]
    check_file(path, STATE_FILE, manifest["files"][STATE_FILE])  # which all read
    for name in own:
        check_file(path, name, manifest["files"][name])
    state = _checked_state(path, manifest)
    for name in own:
        _check_tensors(path, name, state)


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is good, None if there are none at all (a collective call). Nothing in the folder is changed.

    Every one that is rejected is named in the log, with the file and the reason. Checkpoints that belong neither to this user nor to the
    owner of the run folder are rejected: somebody else put them there.

    Raises:
        DataError: there are checkpoints, and none is good; on all ranks.
    """
    rejected = []
    for path in reversed(on_main(lambda: _folders(folder))):
        try:
            on_main(functools.partial(_check_owner, path))
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


def _folders(folder: Path) -> list[Path]:
    try:
        return checkpoint_folders(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); look at the file system") from None


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
            f"{path / MANIFEST}: is that of step {shown(manifest.get('step'))}; the folder was renamed, use another one"
        )
    for name in (STATE_FILE, FROZEN_FILE):
        if name not in manifest["files"]:
            raise DataError(f"{path / MANIFEST}: does not list {name}; it is not that of a checkpoint, use another one")
    known = {MANIFEST, *manifest["files"]}
    for name in sorted(os.listdir(path)):
        if name not in known and not name.startswith("."):
            raise DataError(f"{path / printable(name)}: is not in the manifest and does not belong there; remove it")
    return manifest


def _checked_state(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The state, held against the manifest."""
    state = read_state(path)
    if state["step"] != manifest.get("step"):
        raise DataError(
            f"{path / STATE_FILE}: is that of step {state['step']}, the manifest of another; use another one"
        )
    missing = sorted(files_of(state) - manifest["files"].keys())
    if missing:
        raise DataError(
            f"{path / STATE_FILE}: names {shown(missing[0])}, which is not in the manifest; use another one"
        )
    return state


def _check_tensors(path: Path, name: str, state: dict[str, Any]) -> None:
    """Holds the header of a file of tensors against the index."""
    if name == STATE_FILE:
        return
    with TensorFile(path / name) as file:
        for tensor, numel in tensors_of(state, name).items():
            if numel not in (None, file.numel(tensor)):
                raise DataError(
                    f"{path / name}: {printable(tensor)} has {file.numel(tensor)} elements, the index says {numel}; use another one"
                )

"""Locks that a killed build of a PyTorch extension leaves behind: who finds one waits for ever.

PyTorch and DeepSpeed compile extensions on first use, in one folder each below TORCH_EXTENSIONS_DIR, with a file named `lock` that the builder
keeps open and removes at the end (`torch.utils.file_baton`). Triton's cache and ours have no such files.
"""

import logging
import os
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from spade_t5.errors import ConfigError

logger = logging.getLogger("spade_t5")

LOCAL_FILE_SYSTEMS = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
"""Where every process that has a file open is one of this machine."""


def clear_stale_locks() -> None:
    """Removes the locks of builds whose process is gone.

    Raises:
        ConfigError: a lock may belong to a build of another machine or user, and nobody here can tell.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(folder).glob("*/lock") if folder else Path(get_default_build_root()).glob("*/*/lock")
    for lock in sorted(locks):
        builder = _process_that_has_open(lock)
        if builder is not None:
            logger.info("%s: process %d builds an extension, whoever needs it waits", lock, builder)
        elif _may_be_open_unseen(lock):
            raise ConfigError(
                f"{lock}: a build of an extension that no process here carries on, and whoever needs it waits for ever; "
                "remove the file if no other machine or user is at it, or set TORCH_EXTENSIONS_DIR to a folder of this machine"
            )
        else:
            lock.unlink(missing_ok=True)
            logger.warning("%s: removed, the build that left it is gone", lock)


def _process_that_has_open(path: Path) -> int | None:
    """Id of a process that has the file open, as far as this user may see."""
    wanted = os.path.realpath(path)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) == wanted for entry in os.scandir(process / "fd")):
                return int(process.name)
        except OSError:
            continue  # ended meanwhile, or of another user
    return None


def _may_be_open_unseen(path: Path) -> bool:
    """Whether processes that this one cannot see could have the file open: of another machine, or of another user."""
    try:
        owner = path.stat().st_uid
    except FileNotFoundError:
        return False
    return _file_system_of(path) not in LOCAL_FILE_SYSTEMS or os.geteuid() not in (0, owner)


def _file_system_of(path: Path) -> str:
    """Type of the file system that a file is on, such as ext4 or nfs4; empty if the system does not tell."""
    parts = Path(os.path.realpath(path)).parts
    deepest: tuple[str, ...] = ()
    kind = ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in lines:
        mount, _, source = line.partition(" - ")
        place = Path(mount.split()[4]).parts
        if parts[: len(place)] == place and len(place) >= len(deepest):  # a later mount hides an earlier one
            deepest, kind = place, source.split()[0]
    return kind

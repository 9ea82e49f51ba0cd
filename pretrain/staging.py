"""A token store copied to a disk of the machine, where many small reads are fast.

Every file is checked against the manifest while it is copied, and the copy gets its name when all are there. A copy that was interrupted goes on
with the files that are missing. Processes of one machine may ask at once: one copies, the others wait for it.
"""

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spade_t5.checkpoint.manifest import file_sha256, publish, sync
from spade_t5.errors import DataError
from spade_t5.pretrain.store import MANIFEST, TokenStore

_BLOCK_BYTES = 2**24
_SPARE_BYTES = 2**26  # for what else happens on the disk meanwhile


def stage(store: Path, folder: Path) -> Path:
    """Copies a store into a folder, unless its copy is there already.

    Args:
        store: folder of the store.
        folder: folder on a local disk, made if it is missing; the copy is named after the store and its content.

    Returns:
        Folder of the copy.

    Raises:
        DataError: there is no complete store, a file of it or of its copy is damaged, or the folder cannot be written or is too small.
    """
    source = TokenStore.open(store)
    final = folder / f"{store.resolve().name}-{source.identity[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{final.name}.lock"):
            partial = folder / f".{final.name}.partial"
            _check_owner(partial)
            if not final.exists():
                _copy(source, partial, final)
    except OSError as error:
        if error.errno is None:
            raise
        raise DataError(
            f"staging_dir: {error.filename or folder}: {error.strerror}; make room or choose another disk, what was copied is kept"
        ) from None
    _check_owner(final)
    try:
        TokenStore.open(final)
    except DataError as error:
        reason = str(error).partition(";")[0]
        raise DataError(f"staging_dir: {reason}; delete the copy {final}, and it is made again") from None
    return final


def _copy(source: TokenStore, partial: Path, final: Path) -> None:
    partial.mkdir(exist_ok=True)
    for leftover in partial.rglob("*.copying"):
        leftover.unlink()
    left = {
        name: (num_bytes, sha256)
        for name, (num_bytes, sha256) in source.files().items()
        if not _is_there(partial / name, num_bytes, sha256)
    }
    needed, free = sum(num_bytes for num_bytes, _ in left.values()) + _SPARE_BYTES, shutil.disk_usage(partial).free
    if needed > free:
        raise DataError(
            f"staging_dir: {partial.parent} has {free / 1e9:.1f} GB free, a copy of {source.path} needs {needed / 1e9:.1f} GB more; "
            "make room or choose another disk"
        )
    for name, (_, sha256) in left.items():
        _copy_file(source.path / name, partial / name, sha256)
    shutil.copyfile(source.path / MANIFEST, partial / MANIFEST)
    sync(partial / MANIFEST)
    publish(partial, final)


def _check_owner(copy: Path) -> None:
    """Refuses what somebody else has put into a folder that all may write to, such as /tmp: a link, or a copy with other text.

    Raises:
        DataError: it is a link, or belongs to another user than this one or root.
    """
    try:
        found = copy.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise DataError(f"staging_dir: {copy} is a link or belongs to somebody else; choose a folder of your own")


def _is_there(file: Path, num_bytes: int, sha256: str) -> bool:
    return file.is_file() and file.stat().st_size == num_bytes and file_sha256(file) == sha256


def _copy_file(source: Path, target: Path, sha256: str) -> None:
    """Copies a file, which has its name only when all of it is there and right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    copying = target.with_name(f"{target.name}.copying")
    digest = hashlib.sha256()
    with source.open("rb") as reader, copying.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    if digest.hexdigest() != sha256:
        copying.unlink()
        raise DataError(f"{source}: sha256 differs from the manifest; the store is damaged, make it again")
    copying.replace(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends."""
    # Neither emptied nor followed: another user may have put a link there.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

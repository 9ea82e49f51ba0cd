"""Disks of a node: the run folder as this node sees it, and folders of the node's own."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spade_t5.checkpoint import list_checkpoints
from spade_t5.checkpoint.manifest import create, sync, unique_name, whole_file

SHARED_MEMORY = Path("/dev/shm")
_SMALL_WRITES = 5
_SMALL_BYTES = 4096
_LARGE_BYTES = 16 << 20
_SHARE_OF_FREE = 8


def run_folder(folder: Path) -> dict[str, Any]:
    """How the run folder behaves here: free bytes, file system, whether names and writes do what checkpoints rely on, and how fast."""
    facts: dict[str, Any] = {"run_free_bytes": shutil.disk_usage(folder).free, "run_file_system": file_system(folder)}
    facts["run_checkpoints"] = len(list_checkpoints(folder / "checkpoints"))
    place = folder / unique_name("doctor")
    place.mkdir()
    try:
        facts["run_semantics"] = _what_does_not_hold(place)
        facts["run_sync_seconds"] = statistics.median(
            _seconds_of(lambda: _write(place / "small", _SMALL_BYTES)) for _ in range(_SMALL_WRITES)
        )
        size = min(_LARGE_BYTES, facts["run_free_bytes"] // _SHARE_OF_FREE)
        if size > _SMALL_BYTES:
            facts["run_bytes_per_second"] = size / _seconds_of(lambda: _write(place / "large", size))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return facts


def own_disks(staging: Path | None) -> dict[str, Any]:
    """Room in the folders that are this node's own: temporary files and caches, shared memory, and copies of stores if the run makes them."""
    temporary = Path(tempfile.gettempdir())
    facts: dict[str, Any] = {"temporary": str(temporary), "temporary_free_bytes": shutil.disk_usage(temporary).free}
    if SHARED_MEMORY.is_dir():
        facts["shared_memory_bytes"] = shutil.disk_usage(SHARED_MEMORY).total
    if staging is not None:
        facts["staging_free_bytes"] = shutil.disk_usage(_existing(staging)).free
    return facts


def file_system(path: Path) -> str:
    """Kind of the file system that a folder lies on, such as ext4 or nfs4."""
    place = os.path.realpath(path)
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mounted, name, *_ = line.split(" ")
        mounted = mounted.encode().decode("unicode_escape")
        if len(mounted) >= len(best) and (place == mounted or place.startswith(mounted.rstrip("/") + "/")):
            best, kind = mounted, name
    return kind


def _what_does_not_hold(place: Path) -> list[str]:
    """What checkpoints and the lease rely on and does not hold here; nothing where all is well."""
    broken = []
    file = place / "file"
    with create(file) as stream:
        stream.write(b"first")
    try:
        create(file).close()
        broken.append("a file can be made twice")
    except FileExistsError:
        pass
    with whole_file(file) as stream:
        stream.write(b"second")
    if file.read_bytes() != b"second":
        broken.append("a rename does not replace a file")
    folder, published = place / ".folder", place / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")
    sync(folder)
    os.rename(folder, published)
    sync(place)
    if folder.exists() or (published / "file").read_bytes() != b"content":
        broken.append("a folder is not renamed as one")
    return broken


def _write(path: Path, num_bytes: int) -> None:
    """Writes a file to disk, as the files of checkpoints are."""
    block = bytes(1 << 20)
    with path.open("wb") as file:
        for start in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def _seconds_of(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not path.exists():
        path = path.parent
    return path

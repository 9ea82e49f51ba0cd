"""A folder that appears whole or not at all, and that knows the hash of each of its files.

Files are written into a hidden folder beside the final one, synced to disk, listed in `manifest.json` with size and sha256 (the manifest
carries its own), and published by one rename.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spade_t5.errors import DataError
from spade_t5.messages import shown

MANIFEST = "manifest.json"
FILE_MODE, FOLDER_MODE = 0o644, 0o755
"""At most these permissions, whatever the umask: nobody else may change what a run goes on from."""
MAX_JSON_BYTES = 32 << 20
"""Larger JSON files are not of our making and are not read into memory."""


def file_sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file; the file is synced to disk first."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def create(path: Path) -> BinaryIO:
    """Opens a new file for unbuffered writing that only its owner may change.

    Raises:
        FileExistsError: there is something under that name, a link included.
    """
    return open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, FILE_MODE))


def sync(path: Path) -> None:
    """Forces a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unique_name(name: str) -> str:
    """A hidden name for something unfinished that no other process takes, on this host or another that shares the folder."""
    return f".{name}.{os.uname().nodename}.{os.getpid()}.{secrets.token_hex(4)}.partial"


def remove_leftovers(folder: Path, name: str) -> None:
    """Removes what dead processes of this host left in `folder` under a `unique_name` of `name`."""
    mine = re.compile(re.escape(f".{name}.{os.uname().nodename}.") + r"(\d+)\.[0-9a-f]{8}\.partial")
    for path in folder.iterdir():
        match = mine.fullmatch(path.name)
        if match and not _is_process(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def whole_file(path: Path, *, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that is there whole or not at all, and on disk when the block ends.

    Args:
        path: its name.
        scratch: folder of the same file system in which it is unfinished; that of `path` by default.
    """
    partial = (scratch or path.parent) / unique_name(path.name)
    try:
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, FILE_MODE)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Writes `manifest.json` over the files named in `entries` (from `file_entry`), with further `facts`."""
    content = {**facts, "files": dict(sorted(entries.items()))}
    write_small(folder / MANIFEST, _rendered(content))


def _rendered(content: dict[str, Any]) -> bytes:
    """The only text that a manifest of this content may have."""
    return json.dumps({**content, "sha256": content_hash(content)}, indent=1).encode()


def write_small(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a new file that fits in memory to disk; returns its manifest entry, whose hash is that of the memory."""
    with create(path) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished folder its name, atomically."""
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against its own hash.

    Raises:
        DataError: it is missing, damaged, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = read_small(path)
        content = json.loads(text)
        del content["sha256"]
        names = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DataError(
            f"{path}: missing or unreadable; the folder was not written completely, use another one"
        ) from None
    if text != _rendered(content):
        raise DataError(f"{path}: its content does not match its own hash; the folder is damaged, use another one")
    for name in names:
        if not is_plain_name(name):
            raise DataError(f"{path}: names {shown(name)}, which is not a plain file name; refused")
    return content


def read_small(path: Path) -> bytes:
    """Content of a plain file of reasonable size.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is larger than `MAX_JSON_BYTES`.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
    return content


def is_plain_name(name: str) -> bool:
    """Whether a name from a file means a file of the same folder: no path, no `..`, nothing unprintable."""
    return name not in ("", "..") and Path(name).name == name and name.isprintable()


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Compares a file with its manifest entry.

    Raises:
        DataError: the file is missing, or its size or hash is another.
    """
    path = folder / name
    try:
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{path}: missing or not a plain file; the folder is damaged, use another one")
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            raise DataError(
                f"{path}: {num_bytes} bytes, expected {shown(entry['bytes'])}; the folder is damaged, use another one"
            )
        if file_sha256(path) != entry["sha256"]:
            raise DataError(f"{path}: sha256 differs from the manifest; the folder is damaged, use another one")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); use another one") from None


def verify_folder(folder: Path) -> dict[str, Any]:
    """Checks every file of a folder against its manifest, which is returned.

    Raises:
        DataError: as `read_manifest` and `check_file`.
    """
    content = read_manifest(folder)
    for name, entry in content["files"].items():
        check_file(folder, name, entry)
    return content


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

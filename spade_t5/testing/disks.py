"""File systems of their own for tests that fill a disk or take away the permission to write to it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """An empty file system in memory at `place`, which is made; `size` as mount writes it. Where mounting is not permitted, the calling test is skipped."""
    place.mkdir()
    done = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    if done.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def remount(disk: Path, options: str) -> None:
    """Changes how a disk is mounted, such as to `ro`."""
    done = _mount("-o", f"remount,{options}", str(disk))
    assert done.returncode == 0, done.stderr


def _mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)

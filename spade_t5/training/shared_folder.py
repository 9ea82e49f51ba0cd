"""Checks of a run folder before anything expensive: it can be made and written, and every rank sees the same one."""

import contextlib
import os
import secrets
import time
from pathlib import Path

from spade_t5.checkpoint.manifest import FOLDER_MODE, sync, whole_file
from spade_t5.errors import ConfigError
from spade_t5.messages import printable
from spade_t5.training import distributed
from spade_t5.training.agreement import on_every_rank, on_main

PATIENCE_SECONDS = 15.0
"""How long a rank waits to see another's file; network file systems remember for some seconds what was not there."""


def make_folder(run_dir: Path) -> list[Path]:
    """Makes the folder where it is missing, and its parents.

    Returns:
        the folders that were made, innermost first.

    Raises:
        ConfigError: it cannot be made, or it is not a folder of its own.
    """
    made: list[Path] = []
    try:
        _check_plain(run_dir)
        for folder in (*reversed(run_dir.parents), run_dir):
            if not folder.exists():
                folder.mkdir(FOLDER_MODE, exist_ok=True)
                made.insert(0, folder)
    except (OSError, ValueError) as error:  # a name that no file can have
        remove_empty(made)
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"run_dir: {printable(run_dir)} cannot be made ({reason}); choose another folder") from None
    return made


def _check_plain(run_dir: Path) -> None:
    for path in (run_dir, run_dir / "checkpoints"):
        if path.is_symlink():
            target = os.path.realpath(path)
            raise ConfigError(
                f"run_dir: {path} is a symbolic link to {target}; {_remedy(path, run_dir, target)}, so that no second name leads to one run"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir: {path} is a file; choose another folder")


def _remedy(path: Path, run_dir: Path, target: str) -> str:
    return f"give run_dir={target}" if path == run_dir else "move the checkpoints into the run folder"


def remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_shared(folder: Path, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Fails unless every rank can write into the folder and sees what the others write there (a collective call).

    Each rank writes a small file the way checkpoints are published: beside its name, synced to disk, renamed. Everyone then looks for the
    main rank's, and the main rank for all.

    Args:
        folder: the folder, which the main rank has made.
        patience_seconds: how long files may take to be seen.

    Raises:
        ConfigError: naming rank, host and folder; on every rank.
    """
    token = on_main(lambda: secrets.token_hex(8))
    hosts = distributed.gather_objects(os.uname().nodename)
    files = [folder / f".rank-{rank:05d}-{token}" for rank in range(len(hosts))]
    own = distributed.rank()
    try:
        on_every_rank(lambda: _write(files[own], own, hosts[own]))
        wanted = range(len(hosts)) if own == 0 else (0,)
        on_every_rank(lambda: _wait_for([(files[rank], rank) for rank in wanted], own, hosts, patience_seconds))
    finally:
        with contextlib.suppress(OSError):
            files[own].unlink(missing_ok=True)


def _write(file: Path, rank: int, host: str) -> None:
    try:
        with whole_file(file) as stream:
            stream.write(host.encode())
        sync(file.parent)
    except OSError as error:
        raise ConfigError(
            f"run_dir: rank {rank} on {host} cannot write into {file.parent} ({error.strerror}); give a folder that all nodes share and may write"
        ) from None


def _wait_for(files: list[tuple[Path, int]], own: int, hosts: list[str], patience_seconds: float) -> None:
    until = time.monotonic() + patience_seconds
    for file, rank in files:
        while not _is_seen(file, hosts[rank]):
            if time.monotonic() > until:
                raise ConfigError(
                    f"run_dir: rank {own} on {hosts[own]} does not see in {file.parent} what rank {rank} on {hosts[rank]} wrote there; "
                    "give a folder that all nodes share"
                )
            time.sleep(0.1)


def _is_seen(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False

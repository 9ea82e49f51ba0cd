"""Decisions that all ranks share, so that a mistake is refused by all of them and none waits for another that has left."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spade_t5.errors import ConfigError, RunAbortedError, UserError
from spade_t5.training import distributed

T = TypeVar("T")


def on_main(action: Callable[[], T]) -> T:
    """What `action` returns on the main rank, which alone runs it, on every rank (a collective call).

    Raises:
        UserError, RunAbortedError: raised by `action`; on every rank.
    """
    outcome: T | Exception | None = None
    if distributed.is_main():
        try:
            outcome = action()
        except (UserError, RunAbortedError) as error:
            outcome = error
    decided = distributed.gather_objects(outcome)[0]
    if isinstance(decided, Exception):
        raise decided
    return decided  # type: ignore[return-value]  # that of the main rank, which is set


def write_on_main(name: str, folder: Path, action: Callable[[], object]) -> None:
    """Lets the main rank write into a folder (a collective call).

    Args:
        name: the setting that the folder was given by, for the message.
        folder: the folder.
        action: writes.

    Raises:
        ConfigError: it cannot be written; on every rank.
    """
    on_main(lambda: _written(name, folder, action))


def write_on_every_rank(name: str, folder: Path, action: Callable[[], object]) -> None:
    """Lets every rank write into a folder (a collective call); as `write_on_main`."""
    on_every_rank(lambda: _written(name, folder, action))


def _written(name: str, folder: Path, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        raise ConfigError(
            f"{name}: {folder} cannot be written ({error.strerror or error}); choose another folder"
        ) from None


def on_every_rank(action: Callable[[], T]) -> T:
    """What `action` returns on this rank, once it has ended well on all (a collective call).

    Raises:
        UserError, RunAbortedError: raised by `action` on any rank, the first of them; on every rank.
    """
    problem: Exception | None = None
    try:
        result = action()
    except (UserError, RunAbortedError) as error:
        problem = error
    for found in distributed.gather_objects(problem):
        if found is not None:
            raise found
    return result

"""How a rank ended, as a file for whoever started it.

torchrun ends with exit code 1 whatever the ranks ended with, and shows the failure that it saw first, which is often a consequence: when a rank
dies, the others fail in the middle of a collective. So every rank says in a file how it ended and whether that was its own doing.
"""

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from spade_t5.messages import one_line
from spade_t5.training import distributed


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one rank ended."""

    rank: int
    """Its number among all."""
    code: int
    """Exit code."""
    message: str
    """Why, in one line; empty for exit code 0."""
    seconds: float
    """When, in seconds since 1970."""
    is_consequence: bool = False
    """Whether another rank's end was the reason."""


_folder: Path | None = None
_is_recorded = False


def record_outcomes_in(folder: Path) -> None:
    """Chooses the folder for `record_outcome`, which must exist and be the same for all ranks of a machine."""
    global _folder
    _folder = folder


def record_outcome(code: int, message: str, *, is_consequence: bool = False) -> None:
    """Says how this process ends; the first time counts. Without a folder, or one that can be written, nothing is written."""
    global _is_recorded
    if _folder is None or _is_recorded:
        return
    _is_recorded = True
    rank = distributed.rank()
    outcome = Outcome(
        rank=rank,
        code=code,
        message=one_line(" ".join(message.split())),
        seconds=time.time(),
        is_consequence=is_consequence,
    )
    path = _folder / f"rank-{rank}.json"
    unfinished = path.with_suffix(".tmp")
    with suppress(OSError):
        unfinished.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        os.replace(unfinished, path)


def log_outcome(logger: logging.Logger, message: str) -> None:
    """Logs a message that `record_outcome` was given too, so that it is shown once."""
    logger.error("%s", message, extra={"is_outcome": True})


def is_outcome(record: logging.LogRecord) -> bool:
    """Whether a record was made by `log_outcome`."""
    return getattr(record, "is_outcome", False)


def read_outcomes(folder: Path) -> list[Outcome]:
    """What the ranks said, in rank order."""
    outcomes = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    return sorted(outcomes, key=lambda outcome: outcome.rank)

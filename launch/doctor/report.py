"""Facts of one node, gathered one by one so that none keeps another from being known."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from spade_t5.messages import reason_of

PATIENCE_SECONDS = 120.0
"""How long all facts may take together; a network file system that hangs would else hold everything up."""
LEAST_SECONDS = 5.0
"""How long one fact may take at least, whatever the others took."""

Gatherer = Callable[[], Mapping[str, Any]]
"""Gives facts by their names, JSON values; raises if they cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one node says of itself."""

    node: str
    """Name of the node."""
    rank: int
    """Number of its first process, which speaks for it."""
    num_ranks: int
    """Processes on it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """By name; JSON values."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why facts could not be had, by what was asked for."""

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is wrong."""

    check: str
    """Title of the check."""
    node: str
    """Where; empty for what concerns all."""
    value: str
    """What was found."""
    remedy: str
    """What to do."""

    def as_json(self) -> dict[str, str]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        return f"{self.node or 'all nodes'}: {self.check}: {self.value}; {self.remedy}"


def gather(
    gatherers: Mapping[str, Gatherer], *, patience_seconds: float = PATIENCE_SECONDS
) -> tuple[dict[str, Any], dict[str, str]]:
    """Calls each gatherer, whatever becomes of the others.

    Args:
        gatherers: by what they gather.
        patience_seconds: how long all may take; the thread of one that does not answer is left behind, for nothing wakes one that waits for a dead disk.

    Returns:
        facts by their names, and reasons by gatherer of those that failed.
    """
    facts: dict[str, Any] = {}
    problems: dict[str, str] = {}
    until = time.monotonic() + patience_seconds
    for name, gatherer in gatherers.items():
        seconds = max(until - time.monotonic(), min(LEAST_SECONDS, patience_seconds))
        result: dict[str, Any] = {}
        thread = threading.Thread(target=_call, args=(gatherer, result), name=f"doctor-{name}", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            problems[name] = f"no answer within {seconds:.3g} s"
        elif "error" in result:
            problems[name] = reason_of(result["error"]) or type(result["error"]).__name__
        else:
            facts |= result["facts"]
    return facts, problems


def _call(gatherer: Gatherer, result: dict[str, Any]) -> None:
    try:
        result["facts"] = dict(gatherer())
    except Exception as error:  # any library may fail in any way on a node that is out of order
        result["error"] = error

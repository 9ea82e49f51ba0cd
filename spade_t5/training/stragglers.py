"""Which rank keeps the others waiting.

Ranks that work together all take as long as the slowest: the time of a step says nothing about a rank. What a rank spends by itself
does, that is a step without the waiting for collectives. Where those overlap with the computation on a GPU (ZeRO 3), what is seen is that the
computation's own stream stands still for parameters; the wait for the last gradients at the end of a backward pass counts as the rank's own.
"""

import logging
import socket
import statistics
from collections.abc import Sequence
from typing import Any

from spade_t5.training import distributed

logger = logging.getLogger("spade_t5")

SLOW_FACTOR = 1.3
"""A rank is slow whose own time exceeds the median by this factor."""
PATIENCE = 3
"""So many times in a row, before it is said."""


class RankTimes:
    """Gathers what the steps of every rank took, every so many steps."""

    def __init__(self, every_steps: int) -> None:
        """Learns the ranks' hosts (a collective call)."""
        self._every_steps = every_steps
        self._hosts = distributed.gather_objects(socket.gethostname())
        self._sums = [0.0, 0.0]
        self._steps = 0
        self._warnings = SlowRanks(self._hosts)

    def add(self, step: int, seconds: float, own_seconds: float, memory_bytes: float) -> dict[str, Any] | None:
        """Takes in a step; what all ranks took since the last time, if that is due (then a collective call) and there are several.

        Args:
            step: its number, the same on all ranks.
            seconds: that it took.
            own_seconds: of them, those in which the rank did not wait for others.
            memory_bytes: what the rank held.
        """
        self._sums = [self._sums[0] + seconds, self._sums[1] + own_seconds]
        self._steps += 1
        if step % self._every_steps or len(self._hosts) == 1:
            return None
        means = [value / self._steps for value in self._sums]
        self._sums, self._steps = [0.0, 0.0], 0
        by_rank = distributed.gather_numbers([*means, memory_bytes])
        seconds_by_rank, own_by_rank, memory_by_rank = map(list, zip(*by_rank, strict=True))
        slowest = own_by_rank.index(max(own_by_rank))
        if distributed.is_main():
            self._warnings.look_at(step, own_by_rank)
        return {
            "seconds": spread(seconds_by_rank),
            "own_seconds": spread(own_by_rank),
            "memory_bytes": spread(memory_by_rank),
            "slowest_rank": slowest,
            "slowest_host": self._hosts[slowest],
        }


class SlowRanks:
    """Says which ranks are slow, each once until it has recovered."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Takes the host of every rank."""
        self._hosts = hosts
        self._times_slow = [0] * len(hosts)

    def look_at(self, step: int, own_seconds: Sequence[float]) -> None:
        """Takes in what the ranks spend by themselves in a step."""
        median = statistics.median_low(own_seconds)
        for rank, seconds in enumerate(own_seconds):
            self._times_slow[rank] = self._times_slow[rank] + 1 if seconds > SLOW_FACTOR * median else 0
        slow = [rank for rank, times in enumerate(self._times_slow) if times == PATIENCE]
        if slow:
            worst = max(slow, key=own_seconds.__getitem__)
            others = f", and {len(slow) - 1} more" if len(slow) > 1 else ""
            logger.warning(
                "step %d: rank %d (%s)%s keeps the others waiting: it works for %.3g s in a step, half of the ranks for %.3g s or less",
                step, worst, self._hosts[worst], others, own_seconds[worst], median,
            )  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, middle and largest value; of an even number the lower of the two in the middle, so that it is that of a rank.

    >>> spread([3.0, 1.0, 2.0, 9.0])
    {'min': 1.0, 'median': 2.0, 'max': 9.0}
    """
    return {"min": min(values), "median": statistics.median_low(values), "max": max(values)}

"""Helpers that tests of this package, and of models built on it, share."""

from spade_t5.testing.data import dev_data
from spade_t5.testing.failures import documented
from spade_t5.testing.processes import free_port, run_command, torchrun
from spade_t5.testing.ranks import RankGroup, call_on_ranks, launch_ranks

__all__ = [
    "RankGroup",
    "call_on_ranks",
    "dev_data",
    "documented",
    "free_port",
    "launch_ranks",
    "run_command",
    "torchrun",
]

"""Helpers that tests of this package, and of models built on it, share."""

from spade_t5.testing.data import dev_data
from spade_t5.testing.failures import documented
from spade_t5.testing.processes import free_port, run_command, torchrun

__all__ = ["dev_data", "documented", "free_port", "run_command", "torchrun"]

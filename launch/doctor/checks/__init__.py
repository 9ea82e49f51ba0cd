"""What is wrong, from what the nodes said: checks are pure functions from reports to a row of the table and findings."""

from spade_t5.launch.doctor.checks.base import Needs, Row
from spade_t5.launch.doctor.checks.comparison import Comparison, compare

__all__ = ["Comparison", "Needs", "Row", "compare"]

"""How many rows each optimizer step takes: all of the global batch, or fewer at the start of a run.

Small batches learn more from each row early on, when gradients of different rows still agree (arXiv:1812.06162). The number is a pure
function of the step, so a resumed run, on any number of ranks, takes the same rows in the same steps and nothing about it is saved.
"""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchWarmupConfig:
    """The batch grows in equal parts of the warm-up from `initial_rows` by `increment_rows` to the global batch.

    The learning rate does not follow: its schedule counts steps, whatever they hold.
    """

    initial_rows: int
    """Rows of the first steps."""
    steps: int
    """Length of the warm-up, in steps; the step after it is the first of the whole global batch."""
    increment_rows: int | None = None
    """Rows by which the batch grows each time; null: `initial_rows`. Best a multiple of the rows that all ranks run at once."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("initial_rows", "steps", "increment_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of every step of a run.

    >>> rows = StepRows(8, BatchWarmupConfig(initial_rows=2, steps=6))
    >>> [rows.of(step) for step in range(1, 9)]
    [2, 2, 4, 4, 6, 6, 8, 8]
    >>> rows.before(8), rows.num_steps(25)
    (32, 7)
    """

    global_rows: int
    """Rows of one optimizer step, over all ranks and micro-batches, behind the warm-up."""
    warmup: BatchWarmupConfig | None = None
    """What comes first; None: nothing."""

    def of(self, step: int) -> int:
        """Rows of step 1, 2, ..."""
        warmup = self.warmup
        if warmup is None or step > warmup.steps:
            return self.global_rows
        increment = warmup.increment_rows or warmup.initial_rows
        num_levels = -(-(self.global_rows - warmup.initial_rows) // increment)
        return min(self.global_rows, warmup.initial_rows + (step - 1) * num_levels // warmup.steps * increment)

    def before(self, step: int) -> int:
        """Rows of all steps before this one."""
        num_warm = 0 if self.warmup is None else min(step - 1, self.warmup.steps)
        return sum(map(self.of, range(1, num_warm + 1))) + (step - 1 - num_warm) * self.global_rows

    def num_steps(self, rows: float) -> int:
        """The fewest steps that take so many rows."""
        if self.warmup is not None:
            totals = itertools.accumulate(map(self.of, range(1, self.warmup.steps + 1)))
            for step, total in enumerate(totals, 1):
                if total >= rows:
                    return step
            num_warm = self.warmup.steps
        else:
            num_warm = 0
        return num_warm + max(0, -int(-(rows - self.before(num_warm + 1)) // self.global_rows))

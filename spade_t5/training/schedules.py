"""Learning-rate schedules: pure functions of the step, so nothing about them is ever saved.

The factor multiplies each parameter group's peak rate. Step s = 1, 2, ... names the s-th optimizer step; warm-up is linear, s / warmup_steps.
"""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantSchedule:
    """factor = 1 after the warm-up."""

    name: ClassVar[str] = "constant"
    warmup_steps: int = 0
    """Length of the linear warm-up, in steps."""

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step` of `num_steps`."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSchedule:
    """Falls in a straight line from 1 at the end of the warm-up to `final_factor` at the last step."""

    name: ClassVar[str] = "linear"
    warmup_steps: int = 0
    """Length of the linear warm-up, in steps."""
    final_factor: float = 0.0
    """Factor at the last step."""

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step` of `num_steps`."""
        if step <= self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        return 1 - (1 - self.final_factor) * _progress(step, self.warmup_steps, num_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineSchedule:
    """Half a cosine from 1 at the end of the warm-up to `final_factor` at the last step (nanoT5's default)."""

    name: ClassVar[str] = "cosine"
    warmup_steps: int = 0
    """Length of the linear warm-up, in steps."""
    final_factor: float = 0.0
    """Factor at the last step."""

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step` of `num_steps`."""
        if step <= self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, self.warmup_steps, num_steps)))
        return self.final_factor + (1 - self.final_factor) * cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class InverseSqrtSchedule:
    """factor = sqrt(warmup_steps / step) after the warm-up.

    T5's rate 1 / sqrt(max(step, 10000)) is a peak rate of 0.01 with 10,000 warm-up steps, but for its flat start.
    """

    name: ClassVar[str] = "inverse_sqrt"
    warmup_steps: int = 10_000
    """Length of the linear warm-up, in steps; at least 1."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps: {self.warmup_steps} must be at least 1 for inverse_sqrt")

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step` of `num_steps`."""
        return min(_warmup(step, self.warmup_steps), math.sqrt(self.warmup_steps / max(step, 1)))


Schedule = ConstantSchedule | LinearSchedule | CosineSchedule | InverseSqrtSchedule


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, warmup_steps: int, num_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))

"""Learning-rate schedules: pure functions of the step, so nothing about them is ever saved.

The factor multiplies each parameter group's peak rate. Step s = 1, 2, ... names the s-th optimizer step; warm-up is linear, s / warmup_steps.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal


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


@dataclass(frozen=True, kw_only=True, slots=True)
class WSDSchedule:
    """Warm-up, stable, decay: factor = 1 after the warm-up, until it falls to `final_factor` over the last steps (arXiv:2405.18392).

    With d decay steps of which x = (step - (num_steps - d)) / d are over, and f = `final_factor`:

        linear      1 - (1 - f) x
        cosine      f + (1 - f) (1 + cos(pi x)) / 2
        1-sqrt      1 - (1 - f) sqrt(x)

    Without decay, a run is a trunk: it may be lengthened freely, and runs that begin from any of its checkpoints may decay.
    """

    name: ClassVar[str] = "wsd"
    warmup_steps: int = 0
    """Length of the linear warm-up, in steps."""
    decay_steps: int | None = None
    """Length of the decay at the end, in steps; null: `decay_share` decides."""
    decay_share: float | None = None
    """Length of the decay, as a share of all steps of the run, rounded to whole ones; null, where `decay_steps` is null too: no decay."""
    shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """How the factor falls."""
    final_factor: float = 0.0
    """Factor at the last step, if there is a decay."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if self.decay_steps is not None and self.decay_share is not None:
            raise ValueError("decay_steps: has no effect beside decay_share; give one of the two")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps: {self.decay_steps} must be at least 1, or null for no decay")
        if self.decay_share is not None and not 0 < self.decay_share <= 1:
            raise ValueError(
                f"decay_share: {self.decay_share} must be above 0 and at most 1, or null for no decay; decay_steps counts steps"
            )

    def decay_length(self, num_steps: int) -> int:
        """Length of the decay at the end of `num_steps`, in steps; 0: none."""
        return self.decay_steps or round((self.decay_share or 0.0) * num_steps)

    def factor(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step` of `num_steps`."""
        length = self.decay_length(num_steps)
        begin = num_steps - length
        if length == 0 or step <= begin:
            return _warmup(step, self.warmup_steps)
        x = min(1.0, (step - begin) / length)
        left = {"linear": 1 - x, "cosine": 0.5 * (1 + math.cos(math.pi * x)), "1-sqrt": 1 - math.sqrt(x)}[self.shape]
        return _warmup(step, self.warmup_steps) * (self.final_factor + (1 - self.final_factor) * left)


Schedule = ConstantSchedule | LinearSchedule | CosineSchedule | InverseSqrtSchedule | WSDSchedule


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, warmup_steps: int, num_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))

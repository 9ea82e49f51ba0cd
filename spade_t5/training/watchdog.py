"""Notices that a rank hangs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeoutsConfig:
    """How long each phase of a run may go without progress before the rank counts as hanging."""

    compile_seconds: float = 1800.0
    """The first step of a process, in which kernels are compiled and the first rows are read."""
    step_seconds: float | None = None
    """A step, with the wait for its rows; null: 60 s or five times the slowest of the last 100 steps, whichever is longer."""
    evaluation_seconds: float = 600.0
    """One batch of an evaluation."""
    save_seconds: float = 1800.0
    """A checkpoint, from the copy to host memory until it is published."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("compile_seconds", "step_seconds", "evaluation_seconds", "save_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: {value} must be positive")

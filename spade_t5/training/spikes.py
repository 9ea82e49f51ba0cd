"""Loss spikes: a step whose loss is far above those before it."""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikesConfig:
    """What counts as a loss spike, and what is done about it."""

    action: Literal["skip", "rollback"] = "skip"
    """skip leaves the weights as they are; rollback returns to the newest checkpoint and goes on behind the data of the spike."""
    deviations: float = 6.0
    """A loss spikes when it exceeds the mean of the window by more than this many standard deviations."""
    window_steps: int = 128
    """Steps that mean and deviation are taken over; before so many were made, nothing is a spike."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.deviations <= 0:
            raise ValueError(f"deviations: {self.deviations} must be positive")
        if self.window_steps < 2:
            raise ValueError(f"window_steps: {self.window_steps} must be at least 2")


class SpikeDetector:
    """Largest loss that is no spike, from the losses before it.

    limit = mean + deviations * standard deviation of the last `window_steps` losses (the rule of OLMo-core's SkipStepOptimizer)

    >>> detector = SpikeDetector(SpikesConfig(window_steps=4, deviations=2.0))
    >>> for loss in (3.0, 5.0, 3.0, 5.0):
    ...     detector.add(loss)
    >>> round(detector.limit, 3)  # 4 + 2 * 1.155
    6.309
    """

    def __init__(self, config: SpikesConfig, losses: Iterable[float] = ()) -> None:
        """Starts from the losses of earlier steps, such as those that a checkpoint carries."""
        self._config = config
        self._losses = deque(losses, maxlen=config.window_steps)

    @property
    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)

    @property
    def limit(self) -> float:
        """Infinite until the window is full."""
        if len(self._losses) < self._config.window_steps:
            return float("inf")
        return statistics.fmean(self._losses) + self._config.deviations * statistics.stdev(self._losses)

    def add(self, loss: float) -> None:
        """Takes the loss of a step that was applied into the window."""
        self._losses.append(loss)

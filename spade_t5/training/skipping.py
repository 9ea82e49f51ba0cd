"""Steps that were not applied, and when there are too many of them."""

from collections.abc import Iterable

from spade_t5.errors import RunAbortedError

WINDOW_STEPS = 1000
MOST_IN_WINDOW = 10


class SkippedSteps:
    """Counts skipped steps and ends a run that skips for ever.

    Args:
        most_in_a_row: the run ends when so many consecutive steps were skipped.
        steps: numbers of skipped steps that a checkpoint remembers.
    """

    def __init__(self, most_in_a_row: int, steps: Iterable[int] = ()) -> None:
        self._most_in_a_row = most_in_a_row
        self._steps = list(steps)

    @property
    def steps(self) -> list[int]:
        """Numbers of the skipped steps among the last thousand."""
        return list(self._steps)

    def add(self, step: int, reason: str) -> None:
        """Takes in a skipped step.

        Raises:
            RunAbortedError: it was one too many.
        """
        self._steps = [earlier for earlier in self._steps if earlier > step - WINDOW_STEPS] + [step]
        in_a_row = next((i for i, earlier in enumerate(reversed(self._steps)) if earlier != step - i), len(self._steps))
        remedy = "see events.jsonl for the samples; lower the learning rate, or resume from an earlier checkpoint"
        if in_a_row >= self._most_in_a_row:
            raise RunAbortedError(f"{in_a_row} steps in a row were skipped up to step {step}: {reason}; {remedy}")
        if len(self._steps) > MOST_IN_WINDOW:
            raise RunAbortedError(
                f"{len(self._steps)} of the last {WINDOW_STEPS} steps were skipped up to step {step}: {reason}; {remedy}"
            )

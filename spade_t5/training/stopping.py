"""What asks a run to stop: signals, and the clock."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType
from typing import NoReturn, Self

logger = logging.getLogger("spade_t5")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0
"""Signals so close together are one request: a scheduler and a launcher may both deliver it."""
EXIT_STOPPED = 75

_STARTED = time.monotonic()


class StopRequests:
    """Turns signals and the end of the allowed time into a flag that the training loop reads between steps.

    A second signal ends the process at once: what was saved stays, steps since then are lost.
    """

    def __init__(self, max_wall_seconds: float | None) -> None:
        """`max_wall_seconds` counts from the start of the process; None: no limit."""
        self._deadline = None if max_wall_seconds is None else _STARTED + max_wall_seconds
        self._received: tuple[signal.Signals, float] | None = None

    def __enter__(self) -> Self:
        """Takes the signals over; only the main thread can."""
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        now = time.monotonic()
        if self._received is None:
            self._received = (name, now)
        elif now - self._received[1] > SAME_REQUEST_SECONDS:
            _end_at_once(name)


def _end_at_once(name: signal.Signals) -> NoReturn:
    # Not through logging: the signal may have come while its lock was held.
    os.write(2, f"{name.name} came twice: ending without a new checkpoint; start the same command again\n".encode())
    os._exit(EXIT_STOPPED)

"""What asks a run to stop: signals, and the clock.

While it trains a request is a flag, which all ranks look at together; before and after, it breaks off whatever the process does.
"""

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import NoReturn, Self

from spade_t5.errors import StopRequestedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_SECONDS = 1.0
"""Signals so close together are one request: a scheduler and a launcher may both deliver it."""
EXIT_STOPPED = 75

_began = time.monotonic()


def count_wall_seconds_from(began: float) -> None:
    """Lets `max_wall_seconds` count from an earlier moment than the start of this process, by the monotonic clock of this machine."""
    global _began
    _began = began


class BrokenOffError(StopRequestedError):
    """The process was asked to stop where it did not train; other ranks need not know of it."""


class SignalHandler(ABC):
    """Handles some signals while it is entered as a context, in the main thread."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        """Says which."""
        self._numbers = tuple(numbers)

    def __enter__(self) -> Self:
        """Takes the signals over; only the main thread can."""
        self._before = {number: signal.signal(number, self._on_signal) for number in self._numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @abstractmethod
    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """What a signal does."""


class InterruptingStops(SignalHandler):
    """Raises `BrokenOffError` in the main thread at SIGTERM or SIGUSR1, while it is entered as a context.

    A request during the way out that this begins, if it is another one, ends the process at once.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGTERM, signal.SIGUSR1))
        self._received_at: float | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            raise BrokenOffError("stopped before or after training; start the same command again to go on")
        if now - self._received_at > SAME_REQUEST_SECONDS:
            _end_at_once(signal.Signals(number))


class StopRequests(SignalHandler):
    """Turns signals and the end of the allowed time into a flag that the training loop reads between steps.

    A second signal ends the process at once: what was saved stays, steps since then are lost.
    """

    def __init__(self, max_wall_seconds: float | None) -> None:
        """`max_wall_seconds` counts from the start of the process, or of its launcher; None: no limit."""
        super().__init__(SIGNALS)
        self._deadline = None if max_wall_seconds is None else _began + max_wall_seconds
        self._received: tuple[signal.Signals, float] | None = None

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

"""Requests to a launcher that its ranks stop: by a signal, or by a message from another machine of the same launch."""

import signal
import time
from types import FrameType

from spade_t5.training.stopping import SAME_REQUEST_SECONDS, SIGNALS, SignalHandler


class LauncherStop(SignalHandler):
    """What this process was asked to do while it is entered as a context."""

    def __init__(self) -> None:
        is_under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        super().__init__(SIGNALS if is_under_nohup else (*SIGNALS, signal.SIGHUP))
        self.signal: signal.Signals | None = None
        """What the ranks are to get; None as long as nobody has asked."""
        self.at = 0.0
        """When it was asked for, by the monotonic clock in seconds."""
        self.second_at: float | None = None
        """When it was asked for again: ranks end without saving."""

    @property
    def is_requested(self) -> bool:
        """Whether somebody has asked."""
        return self.signal is not None

    @property
    def times(self) -> int:
        """How often somebody has asked: 0, 1 or 2."""
        return (self.signal is not None) + (self.second_at is not None)

    def request(self, number: int) -> None:
        """Asks once more; what comes within a moment of the first counts as the same."""
        now = time.monotonic()
        if self.signal is None:
            # The ranks have no terminal that could go, so they know no SIGHUP.
            self.signal = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            self.at = now
        elif now - self.at > SAME_REQUEST_SECONDS and self.second_at is None:
            self.second_at = now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(number)

"""Where the time of a run goes: one clock that is always in exactly one part, so that the parts never overlap and sum to the whole.

On a CPU the clock is the host's. On a GPU it is the stream that the model runs on: every change of part leaves an event there, so a part lasts
as long as the device worked on it or stood idle in it, whatever the host did meanwhile. The events are read at the end of a lap,
which is where the engine reads the loss anyway: no step waits for its device on behalf of the clock.
"""

import contextlib
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar, get_args

import torch

Part = Literal[
    "data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation", "profile", "rest"
]
PARTS: tuple[Part, ...] = get_args(Part)
OUTSIDE_STEPS: frozenset[Part] = frozenset({"checkpoint", "evaluation", "profile"})
"""Parts that lie between steps; collectives in them belong to them."""

Mark = TypeVar("Mark")


class Clock(ABC, Generic[Mark]):
    """A switch between parts, and what each of them took since the last lap.

    >>> clock = HostClock()
    >>> previous = clock.switch("forward")
    >>> with clock.waiting():
    ...     pass
    >>> [part for part, seconds in clock.lap().items() if seconds > 0]
    ['forward', 'communication', 'rest']
    """

    def __init__(self) -> None:
        """Starts in part rest."""
        self.part: Part = "rest"
        self._marks: list[tuple[Part, Mark]] = [("rest", self._mark())]

    def switch(self, part: Part) -> Part:
        """Goes over to a part; returns the one before."""
        before = self.part
        if part != before:
            self.part = part
            self._marks.append((part, self._mark()))
        return before

    @contextlib.contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """Is in a part, and afterwards in the one before."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Context of a collective: communication in a step; what lies between steps keeps its own."""
        if self.part in OUTSIDE_STEPS or self._is_elsewhere():
            return contextlib.nullcontext()
        return self.within("communication")

    def lap(self) -> dict[Part, float]:
        """Seconds of every part since the last lap, which sum to the time since then."""
        marks = [*self._marks, (self.part, self._mark())]
        self._marks = marks[-1:]
        self._wait_for(marks[-1][1])
        seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            seconds[part] += self._seconds(begin, end)
        self._forget([mark for _, mark in marks[:-1]])
        return seconds

    @abstractmethod
    def _mark(self) -> Mark:
        """Now."""

    @abstractmethod
    def _seconds(self, begin: Mark, end: Mark) -> float:
        """Time between two marks."""

    def _wait_for(self, mark: Mark) -> None:
        """Returns when a mark was passed."""

    def _forget(self, marks: list[Mark]) -> None:
        """Takes back marks that are not asked for any more."""

    def _is_elsewhere(self) -> bool:
        """Whether the caller works beside what is timed."""
        return False


class HostClock(Clock[float]):
    """Time of the host, for what runs on a CPU."""

    def _mark(self) -> float:
        return time.perf_counter()

    def _seconds(self, begin: float, end: float) -> float:
        return end - begin


class StreamClock(Clock[torch.cuda.Event]):
    """Time of the current stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Takes the stream that is current now; what DeepSpeed does on others overlaps with it, and is seen where this one waits for it."""
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._spare: list[torch.cuda.Event] = []
        super().__init__()

    def _mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3

    def _wait_for(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def _forget(self, marks: list[torch.cuda.Event]) -> None:
        self._spare += marks

    def _is_elsewhere(self) -> bool:
        return torch.cuda.current_stream(self._device) != self._stream


AnyClock = HostClock | StreamClock


def clock_of(device: torch.device) -> AnyClock:
    """The clock of what runs on a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()

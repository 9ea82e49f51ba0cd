"""The clock of the engine: parts that never overlap and sum to the whole."""

import itertools
import time
from typing import Any

import pytest
import torch

from spade_t5.training.timing import PARTS, HostClock, StreamClock, clock_of


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def test_parts_sum_to_the_time_between_laps(now: list[float]) -> None:
    clock = HostClock()
    for part, second in (("data", 101.0), ("rest", 104.0), ("data", 104.5), ("data", 105.0)):
        now[0] = second
        clock.switch(part)  # type: ignore[arg-type]
    now[0] = 106.0
    assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "rest": 1.5, "data": 4.5}
    now[0] = 108.0
    assert clock.lap() == {**dict.fromkeys(PARTS, 0.0), "data": 2.0}
    assert sum(clock.lap().values()) == 0


def test_collectives_interrupt_a_step_but_not_what_lies_between_steps(now: list[float]) -> None:
    clock = HostClock()

    def collective(seconds: float) -> None:
        with clock.waiting(), clock.waiting():
            now[0] += seconds

    with clock.within("backward"):
        now[0] += 1
        collective(2)
        now[0] += 4
    for part in ("checkpoint", "evaluation"):
        with clock.within(part):
            collective(8)
    seconds = {part: value for part, value in clock.lap().items() if value}
    assert seconds == {"backward": 5, "communication": 2, "checkpoint": 8, "evaluation": 8}
    assert clock.part == "rest"


def test_a_part_ends_where_an_error_leaves_it() -> None:
    clock = HostClock()
    with pytest.raises(ValueError, match="out"), clock.within("forward"), clock.within("communication"):
        raise ValueError("out")
    assert clock.part == "rest"


def test_a_change_of_part_is_one_look_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes well below a microsecond, and a step of mini, which takes 0.3 s and more, changes parts some twenty times for each micro-batch."""
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    clock = HostClock()
    for _ in range(2):
        for _ in range(20):
            with clock.within("communication"), clock.within("communication"):
                pass
        assert sum(clock.lap().values()) == 2 * 20 + 1  # into the part, out of it, and the end of the lap


class FakeEvent:
    """An event of a stream whose time is the number of events before it, in seconds."""

    made: list["FakeEvent"] = []  # noqa: RUF012 - of one test
    recorded = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.made.append(self)

    def record(self, stream: str) -> None:
        assert stream == "the model's"
        FakeEvent.recorded += 1
        self.milliseconds = 1000.0 * FakeEvent.recorded

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.made
        return end.milliseconds - self.milliseconds


def test_the_clock_of_a_stream_keeps_its_events_and_does_not_see_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = ["the model's"]
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    clock = clock_of(torch.device("cuda", 0))
    assert isinstance(clock, StreamClock)
    for _ in range(3):
        with clock.within("backward"):
            with clock.waiting():
                pass
            current[0] = "another"
            with clock.waiting():
                pass
            current[0] = "the model's"
        seconds = {part: value for part, value in clock.lap().items() if value}
        assert seconds == {"rest": 2.0, "backward": 2.0, "communication": 1.0}
    assert len(FakeEvent.made) == 6  # those of a lap, of which the last is the first of the next


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_of_a_stream_times_the_device() -> None:
    device = torch.device("cuda")
    clock = clock_of(device)
    matrix = torch.randn(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    clock.lap()
    with clock.within("forward"):
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix)
    with clock.within("data"):
        time.sleep(0.2)
    seconds = clock.lap()
    whole = time.perf_counter() - started
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.02)
    assert seconds["forward"] > 0.001
    assert 0.1 < seconds["data"] < 0.21

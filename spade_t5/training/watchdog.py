"""Notices that a rank hangs, says which one, and ends the run so that its launcher starts it again.

Collectives wait for ever, or for a timeout that has to be longer than the longest pause of a healthy run: when one rank stops, all others wait
without a word. So every rank says which phase it enters, and a thread looks whether that was long ago. When it was, the thread writes the
stacks of this process to `logs/`, asks the watchdogs of all other ranks through the process group's store where they stand, and so tells the rank
that does not answer, or that is somewhere else, from those that wait for it.

Should C code hold the interpreter's lock, no Python thread runs; `faulthandler`'s own thread ends the process a little later. At any time,
`kill -USR2 PID` makes a rank write its stacks without ending it.
"""

import faulthandler
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from spade_t5.training import distributed
from spade_t5.training.outcome import record_outcome

logger = logging.getLogger("spade_t5")

Phase = Literal["compile", "data", "step", "evaluation", "save"]

POLL_SECONDS = 0.5
"""Between two looks at the clock, and at the store."""
ANSWER_SECONDS = 5.0
"""How long ranks have to say where they stand; watchdogs answer even while their rank hangs."""
GIL_MARGIN_SECONDS = 30.0
"""How much later than the Python thread the C thread ends the process."""
SHORTEST_STEP_LIMIT_SECONDS = 60.0
STEP_LIMIT_FACTOR = 5.0
STACKS_SIGNAL = signal.SIGUSR2

_HANG_KEY = "watchdog/hang"
_COLLECTIVES = (
    os.sep + os.path.join("torch", "distributed") + os.sep,
    os.sep + os.path.join("deepspeed", "comm") + os.sep,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeoutsConfig:
    """How long each phase of a run may go without progress before the rank counts as hanging."""

    compile_seconds: float = 1800.0
    """The first step of a process, in which kernels are compiled and the first rows are read."""
    step_seconds: float | None = None
    """A step, with the wait for its rows; null: 60 s or five times the slowest of the last 100 steps, whichever is longer,
    but no longer than compile_seconds."""
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

    @property
    def longest_seconds(self) -> float:
        """The longest limit of any phase; collectives have to wait longer than this, so that the watchdog speaks first."""
        return max(self.compile_seconds, self.step_seconds or 0.0, self.evaluation_seconds, self.save_seconds)


class _Position(NamedTuple):
    """Where the main thread is, since when, and until when it may stay."""

    phase: Phase
    step: int
    since: float
    deadline: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A rank's process."""

    host: str
    pid: int
    started: str
    """When, as the kernel counts it; tells the process from a later one with the same number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the watchdog of a rank says when some rank hangs."""

    phase: Phase
    step: int
    seconds: float
    """Since the phase was entered."""
    in_collective: bool
    """Whether the main thread waits for other ranks."""


class Watchdog:
    """Watches this rank's main thread while it is entered as a context, which all ranks do together."""

    def __init__(self, timeouts: TimeoutsConfig, logs: Path) -> None:
        """Prepares a watchdog; `logs` is made if need be, and is the same folder for all ranks."""
        self._timeouts = timeouts
        self._logs = logs
        self._rank = distributed.rank()
        self._main_thread = threading.get_ident()
        self._step_durations: deque[float] = deque(maxlen=100)
        self._position = _Position("compile", 0, time.monotonic(), math.inf)
        self._armed_until = 0.0
        self._is_hanging = threading.Event()
        self._is_closing = threading.Event()
        self._must_look = threading.Event()
        self._has_written_stacks = threading.Event()
        self._all_answered = threading.Event()
        self._reports: dict[int, Report] = {}
        self._stacks_file: IO[str] | None = None

    def __enter__(self) -> "Watchdog":
        """Starts to watch, in phase compile."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._stacks_path = self._logs / f"rank-{self._rank:05d}.stacks.txt"
        self._stacks_file = self._stacks_path.open("a", encoding="utf-8")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks_file, all_threads=True)
        self._processes = distributed.gather_objects(_this_process())
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            # a connection of its own: the main thread may sit in the other one
            self._store = _get_default_store().clone()  # type: ignore[attr-defined]
            self._threads.append(threading.Thread(target=self._correspond, name="watchdog-store", daemon=True))
        self.enter("compile", 0)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends watching; leaves no empty file."""
        if self._is_hanging.is_set():
            # What brings the main thread here is that ranks end; the watchdog is about to, and knows the reason.
            time.sleep(2 * ANSWER_SECONDS)
        self._is_closing.set()
        self._must_look.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS_SIGNAL)
        for thread in self._threads:
            thread.join(2 * POLL_SECONDS)
        assert self._stacks_file is not None
        self._stacks_file.close()
        with suppress(OSError):
            if self._stacks_path.stat().st_size == 0:
                self._stacks_path.unlink()
            self._logs.rmdir()  # fails, as it should, unless it is empty

    def enter(self, phase: Phase, step: int) -> None:
        """Says that the main thread begins a phase of a step; a step and the wait for its rows have one limit together."""
        before = self._position
        self._position = position = self._next_position(phase, step)
        if before.phase in ("compile", "data", "step") and position.since != before.since:
            self._step_durations.append(position.since - before.since)
        # Arming the C thread anew costs 50 us, so it is done only when it would end the process too early or far too late.
        if not position.deadline < self._armed_until < position.deadline + 2 * GIL_MARGIN_SECONDS:
            seconds = position.deadline + GIL_MARGIN_SECONDS - time.monotonic()
            assert self._stacks_file is not None, "the watchdog is entered as a context first"
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks_file)
            self._armed_until = time.monotonic() + seconds

    def _next_position(self, phase: Phase, step: int) -> _Position:
        now = time.monotonic()
        if phase == "step" and self._position.phase == "data" and self._position.step == step:
            return self._position._replace(phase="step")
        return _Position(phase, step, now, now + self.limit_seconds(phase))

    def limit_seconds(self, phase: Phase) -> float:
        """How long the phase may take as things stand."""
        timeouts = self._timeouts
        if phase == "compile":
            return timeouts.compile_seconds
        if phase == "evaluation":
            return timeouts.evaluation_seconds
        if phase == "save":
            return timeouts.save_seconds
        if timeouts.step_seconds is not None:
            return timeouts.step_seconds
        slowest = max(self._step_durations, default=0.0)
        return min(max(SHORTEST_STEP_LIMIT_SECONDS, STEP_LIMIT_FACTOR * slowest), timeouts.compile_seconds)

    def _watch(self) -> None:
        """The thread that looks at the clock."""
        while not self._is_closing.is_set():
            if time.monotonic() > self._position.deadline or self._is_hanging.is_set():
                self._is_hanging.set()
                self._end_run()
            self._must_look.wait(POLL_SECONDS)

    def _correspond(self) -> None:
        """The thread that talks to the other ranks: waits until some rank hangs, then says where this one is and learns where they are.

        It is the only one to use the store, for any operation may block for good once the rank that holds the store is stopped.
        """
        with suppress(RuntimeError):  # the rank that holds the store ended
            while not (self._is_hanging.is_set() or self._store.check([_HANG_KEY])):
                if self._is_closing.wait(POLL_SECONDS):
                    return
            self._store.set(_HANG_KEY, "1")
            self._is_hanging.set()
            self._must_look.set()
            # Whoever has all reports ends, and that breaks the others off: nobody reports before its stacks are written.
            self._has_written_stacks.wait(ANSWER_SECONDS / 2)
            self._store.set(f"watchdog/{self._rank}", json.dumps(asdict(self._report())))
            self._read_reports()

    def _read_reports(self) -> None:
        everyone = range(len(self._processes))
        while missing := set(everyone) - set(self._reports):
            for rank in sorted(missing):
                if self._store.check([f"watchdog/{rank}"]):
                    self._reports[rank] = Report(**json.loads(self._store.get(f"watchdog/{rank}")))
            time.sleep(POLL_SECONDS / 10)
        readers = self._store.add("watchdog/readers", 1)
        while self._rank == 0 and readers < len(everyone):  # the store ends with this rank
            time.sleep(POLL_SECONDS / 10)
            readers = self._store.add("watchdog/readers", 0)
        self._all_answered.set()

    def _report(self) -> Report:
        position = self._position
        return Report(
            phase=position.phase,
            step=position.step,
            seconds=round(time.monotonic() - position.since, 1),
            in_collective=_is_in_collective(sys._current_frames().get(self._main_thread)),
        )

    def _end_run(self) -> None:
        """Writes what this rank knows, names the culprit, and ends the process."""
        own = self._report()
        self._write_stacks(own)
        self._has_written_stacks.set()
        if len(self._processes) > 1:
            self._all_answered.wait(ANSWER_SECONDS)
        else:
            self._reports[0] = own
        reports = dict(self._reports)
        silent = self._silent_ranks(reports)
        message = (
            f"hanging: {describe_hang(reports, silent, self._processes)}; "
            f"the stacks of every rank are in {self._logs}, a new start goes on from the last checkpoint"
        )
        record_outcome(1, message)
        if self._rank == min(set(range(len(self._processes))) - set(silent), default=self._rank):
            logger.error("%s", message)
        self._end_silent_ranks(silent)
        os._exit(1)

    def _silent_ranks(self, reports: dict[int, Report]) -> list[int]:
        if self._rank not in reports:
            return [0]  # which holds the store, and does not serve it
        return [rank for rank in range(len(self._processes)) if rank not in reports]

    def _write_stacks(self, own: Report) -> None:
        file = self._stacks_file
        assert file is not None
        with suppress(OSError):
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            print(
                f"{now} rank {self._rank} in {own.phase} of step {own.step} for {own.seconds} s", file=file, flush=True
            )
            faulthandler.dump_traceback(file, all_threads=True)
            recording = _nccl_flight_recording()
            if recording is not None:
                (self._logs / f"rank-{self._rank:05d}.nccl.json").write_bytes(recording)

    def _end_silent_ranks(self, silent: list[int]) -> None:
        """Kills ranks of this machine that do not answer, so that the launcher need not wait for its grace; they write their stacks first."""
        here = [self._processes[rank] for rank in silent if self._processes[rank].host == socket.gethostname()]
        alive = [process for process in here if process_start(process.pid) == process.started]
        with suppress(ProcessLookupError):
            for process in alive:
                os.kill(process.pid, STACKS_SIGNAL)
                os.kill(process.pid, signal.SIGCONT)
            if alive:
                time.sleep(POLL_SECONDS)
            for process in alive:
                os.kill(process.pid, signal.SIGKILL)


def describe_hang(reports: dict[int, Report], silent: list[int], processes: list[Process]) -> str:
    """One clause that names the ranks that keep the others waiting.

    Args:
        reports: of the ranks that answered.
        silent: ranks that did not.
        processes: of all ranks.
    """

    def names(ranks: list[int]) -> str:
        shown = [f"rank {rank} ({processes[rank].host}, pid {processes[rank].pid})" for rank in ranks[:4]]
        return ", ".join(shown) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")

    answered = sorted(reports)
    if silent:
        place = f"; the others are in {_place(reports[answered[0]])}" if answered else ""
        return f"{names(silent)} did not answer within {ANSWER_SECONDS:g} s: stopped, or its machine is gone{place}"
    reading = [rank for rank in answered if reports[rank].phase == "data"]
    outside = [rank for rank in answered if not reports[rank].in_collective]
    for culprits, deed in ((reading, "waits for its training rows"), (outside, "does not get on")):
        if culprits and (len(culprits) < len(answered) or len(answered) == 1):
            first = reports[culprits[0]]
            waiting = "; the others wait for it" if len(answered) > 1 else ""
            return f"{names(culprits)} {deed} in {_place(first)} for {first.seconds} s{waiting}"
    steps = ", ".join(sorted({_place(report) for report in reports.values()}))
    return f"all {len(answered)} ranks wait for each other in {steps}: the network, or a device, does not get on"


def _place(report: Report) -> str:
    return f"{report.phase} of step {report.step}"


def _is_in_collective(frame: FrameType | None) -> bool:
    """Whether one of the frames belongs to a library of collectives."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
            return True
        frame = frame.f_back
    return False


def _nccl_flight_recording() -> bytes | None:
    """The last collectives on GPUs and which of them are pending, as JSON; None without NCCL."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None) if torch.cuda.is_available() else None
    return None if dump is None or not dist.is_initialized() else dump()


def _this_process() -> Process:
    return Process(host=socket.gethostname(), pid=os.getpid(), started=process_start(os.getpid()) or "")


def process_start(pid: int) -> str | None:
    """When a process started, as the kernel counts it; None if there is none such or it is dead, or the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return None

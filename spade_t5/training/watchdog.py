"""Notices that a rank hangs, says which one, and ends the run so that its launcher starts it again.

Collectives wait for ever, or for a timeout that has to be longer than the longest pause of a healthy run: when one rank stops, all others wait
without a word. So every rank says which phase it enters, and a thread looks whether that was long ago. When it was, the thread writes the
stacks of this process to `logs/`. The watchdogs of all ranks then say through the process group's store where they stand; one of them, the first that
comes, collects this, and all read what it found: which rank does not answer, or is somewhere else than those that wait for it.

Time in which the whole process was suspended does not count.

Should C code hold the interpreter's lock, no Python thread runs: the other ranks end such a process, or `faulthandler`'s own thread some minutes later. At any time,
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
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from spade_t5.data.lines import RETRY_PAUSES_SECONDS
from spade_t5.training import distributed
from spade_t5.training.outcome import log_outcome, record_outcome

logger = logging.getLogger("spade_t5")

Phase = Literal["compile", "data", "step", "evaluation", "save"]

POLL_SECONDS = 0.5
"""Between two looks at the clock, and at the store."""
ANSWER_SECONDS = 5.0
"""How long ranks have to say where they stand; watchdogs answer even while their rank hangs."""
ANSWER_SECONDS_PER_RANK = 0.01
"""So much longer for every rank, which one store serves."""
SUMMARY_MARGIN_SECONDS = 3.0
"""How much longer than the collection takes ranks wait for what was found."""
SUSPENDED_SECONDS = 5.0
"""A thread that sleeps for POLL_SECONDS and wakes up so much later was suspended with its process."""
GIL_MARGIN_SECONDS = 600.0
"""How much later than the Python thread the C thread ends the process. It does not know of suspensions: longer ones than this end a run."""
SHORTEST_STEP_LIMIT_SECONDS = 2 * sum(RETRY_PAUSES_SECONDS)
"""A rank that reads a remote file again and again, and those that wait for it, must not count as hanging; half of it is for the reading."""
STEP_LIMIT_FACTOR = 5.0
STACKS_SIGNAL = signal.SIGUSR2

_HANG_KEY = "watchdog/hang"
_SUMMARY_KEY = "watchdog/summary"
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
    """A step, with the wait for its rows; null: 162 s or five times the slowest of the last 100 steps, whichever is longer,
    but no longer than compile_seconds. Remote files that cannot be read are tried again for 81 s: with such data it should be longer."""
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
    suspended: float
    """Seconds for which the process had been suspended so far, by which the deadline moves."""


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
        self._suspended = 0.0
        self._position = _Position("compile", 0, time.monotonic(), math.inf, 0.0)
        self._armed_until = 0.0
        self._is_hanging = threading.Event()
        self._is_closing = threading.Event()
        self._must_look = threading.Event()
        self._has_written_stacks = threading.Event()
        self._has_summary = threading.Event()
        self._ends_at = math.inf
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
            time.sleep(self._answer_seconds + 2 * SUMMARY_MARGIN_SECONDS)
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
            self._arm(position.deadline)

    def _arm(self, deadline: float) -> None:
        """Lets the C thread end the process some time after a deadline."""
        assert self._stacks_file is not None, "the watchdog is entered as a context first"
        now = time.monotonic()
        seconds = max(deadline - now, 0.0) + GIL_MARGIN_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks_file)
        self._armed_until = now + seconds

    def _next_position(self, phase: Phase, step: int) -> _Position:
        now = time.monotonic()
        if phase == "step" and self._position.phase == "data" and self._position.step == step:
            return self._position._replace(phase="step")
        return _Position(phase, step, now, now + self.limit_seconds(phase), self._suspended)

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
        looked = time.monotonic()
        while not self._is_closing.is_set():
            now = time.monotonic()
            if now - looked > POLL_SECONDS + SUSPENDED_SECONDS:
                self._suspended += now - looked
                self._arm(self._deadline)
            looked = now
            if now > self._deadline or self._is_hanging.is_set():
                self._is_hanging.set()
                self._end_run()
            self._must_look.wait(POLL_SECONDS)

    @property
    def _deadline(self) -> float:
        position = self._position
        return position.deadline + self._suspended - position.suspended

    @property
    def _answer_seconds(self) -> float:
        return ANSWER_SECONDS + ANSWER_SECONDS_PER_RANK * len(self._processes)

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
            # Whoever knows the culprit ends, and that breaks the others off: nobody reports before its stacks are written.
            self._has_written_stacks.wait(ANSWER_SECONDS / 2)
            self._store.set(_report_key(self._rank), json.dumps(asdict(self._report())))
            if self._store.add("watchdog/collectors", 1) == 1:
                self._store.set(_SUMMARY_KEY, json.dumps(self._collect()))
            patience = timedelta(seconds=self._answer_seconds + SUMMARY_MARGIN_SECONDS)
            self._store.wait([_SUMMARY_KEY], patience)
            summary = json.loads(self._store.get(_SUMMARY_KEY))
            self._reports = {int(rank): Report(**fields) for rank, fields in summary.items()}
            readers = self._store.add("watchdog/readers", 1)
            while self._rank == 0 and readers < len(self._reports) and time.monotonic() < self._ends_at:
                time.sleep(POLL_SECONDS / 10)  # the store ends with this rank
                readers = self._store.add("watchdog/readers", 0)
            self._has_summary.set()

    def _collect(self) -> dict[int, dict[str, Any]]:
        """The reports of all ranks that say where they stand in time, as JSON values."""
        everyone = range(len(self._processes))
        deadline = time.monotonic() + self._answer_seconds - ANSWER_SECONDS / 2
        keys = [_report_key(rank) for rank in everyone]
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)
        answered = (
            everyone
            if self._store.check(keys)
            else [rank for rank, key in zip(everyone, keys, strict=True) if self._store.check([key])]
        )
        texts = self._store.multi_get([keys[rank] for rank in answered])
        return {rank: json.loads(text) for rank, text in zip(answered, texts, strict=True)}

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
        everyone = range(len(self._processes))
        self._ends_at = time.monotonic() + self._answer_seconds + SUMMARY_MARGIN_SECONDS
        self._has_written_stacks.set()
        if len(everyone) == 1:
            self._reports = {0: own}
        elif not self._has_summary.wait(self._answer_seconds + SUMMARY_MARGIN_SECONDS):
            self._reports = {}
        is_complete = bool(self._reports)
        reports = self._reports or {self._rank: own}
        # Without a summary nothing is known but that the store, which rank 0 holds, does not serve.
        silent = [rank for rank in everyone if rank not in reports] if is_complete else [0]
        message = (
            f"hanging: {describe_hang(reports, silent, self._processes)}; "
            f"the stacks of every rank are in {self._logs}, a new start goes on from the last checkpoint"
        )
        record_outcome(1, message)
        if self._rank == min(set(everyone) - set(silent), default=self._rank):
            log_outcome(logger, message)
        self._wake_silent_ranks(silent, kills=is_complete)
        os._exit(1)

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

    def _wake_silent_ranks(self, silent: list[int], *, kills: bool) -> None:
        """Has ranks of this machine that do not answer write their stacks, and kills them, so that the launcher need not wait for its grace."""
        others = [self._processes[rank] for rank in silent if rank != self._rank]
        here = [process for process in others if process.host == socket.gethostname()]
        alive = [process for process in here if process_start(process.pid) == process.started]
        with suppress(ProcessLookupError):
            for process in alive:
                os.kill(process.pid, STACKS_SIGNAL)
                os.kill(process.pid, signal.SIGCONT)
            if alive:
                time.sleep(POLL_SECONDS)
            for process in alive if kills else []:
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
        return f"{names(silent)} did not answer in time: stopped, or its machine is gone{place}"
    reading = [rank for rank in answered if reports[rank].phase == "data"]
    outside = [rank for rank in answered if not reports[rank].in_collective]
    for culprits, deed in ((reading, "waits for its training rows"), (outside, "does not get on")):
        if culprits and (len(culprits) < len(answered) or len(answered) == 1):
            first = reports[culprits[0]]
            waiting = "; the others wait for it" if len(answered) > 1 else ""
            return f"{names(culprits)} {deed} in {_place(first)} for {first.seconds} s{waiting}"
    steps = ", ".join(sorted({_place(report) for report in reports.values()}))
    return f"all {len(answered)} ranks wait for each other in {steps}: the network, or a device, does not get on"


def _report_key(rank: int) -> str:
    return f"watchdog/{rank}"


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

"""Keeps the ranks of one machine running: starts torchrun, starts it again after a fault, stops it in an orderly way, and says how it ended.

torchrun starts the ranks and ends all when one fails; whether they start again is decided here, for torchrun knows neither exit codes nor
checkpoints. Signals go from here straight to the ranks, because torchrun would end with a failure, and a second one would break it off. What
dies takes what it started with it: torchrun asks the kernel to be killed with this process, the ranks with torchrun.
"""

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NamedTuple

from spade_t5.checkpoint import list_checkpoints
from spade_t5.launch import rank as rank_script
from spade_t5.training.outcome import Outcome, read_outcomes
from spade_t5.training.stopping import EXIT_STOPPED, SAME_REQUEST_SECONDS, SIGNALS

EXIT_FAULT = 1
EXIT_USER_ERROR = 2

POLL_SECONDS = 0.1
REST_SECONDS = 10.0
"""How long the other ranks have to end once one has failed; they cannot go on, and have nothing to save."""
SECOND_REQUEST_SECONDS = 4.0
"""How long ranks have to end after a second request to stop."""

ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the first rank makes the store; torchrun's would remember ranks that are gone
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What is to be kept running on this machine."""

    command: Sequence[str]
    """Words of the `spade-t5` command that every rank runs."""
    num_ranks: int
    """Ranks on this machine."""
    meeting: Callable[[Path], Sequence[str]]
    """torchrun's options by which machines and ranks find each other, given an empty folder of this machine and start."""
    environment: dict[str, str]
    """Variables of the ranks, beside those of this process."""
    run_dir: Path
    """Folder of the run, in which new checkpoints show that it gets on."""
    logs: Path
    """Folder of the ranks' output."""
    max_restarts: int
    """Starts after a fault without a new checkpoint in between."""
    grace_seconds: float
    """How long the ranks have to save and end once they are asked to stop."""


class Ending(NamedTuple):
    """How a start of all ranks ended."""

    code: int
    message: str
    """One line; empty if there is nothing to say."""


def torchrun_words(launch: Launch, folder: Path) -> list[str]:
    """The command that starts the ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(launch.num_ranks)),
        *launch.meeting(folder),
        *("--max-restarts", "0"),
        *("--shutdown-timeout", f"{REST_SECONDS:g}"),
        *("--signals-to-handle", "SIGQUIT"),
        rank_script.__file__,
        *launch.command,
    ]


def describe(launch: Launch) -> str:
    """The command and its environment, to be shown instead of started."""
    folder = Path(tempfile.gettempdir()) / "FOLDER"
    variables = [f"{name}={shlex.quote(value)}" for name, value in _own_variables(launch, folder).items()]
    return " \\\n  ".join([*variables, shlex.join(torchrun_words(launch, folder))])


def supervise(launch: Launch) -> int:
    """Runs the ranks to their end, over faults, and returns the exit code; what happened is written to the standard error."""
    restarts = 0
    with _Stop() as stop:
        while True:
            newest = _newest_checkpoint(launch.run_dir)
            with tempfile.TemporaryDirectory(prefix="spade-t5-") as folder:
                ending = _Group(launch, Path(folder), stop).run()
            if ending.message:
                _say(ending.message)
            if ending.code != EXIT_FAULT or stop.is_requested:
                return ending.code
            restarts = 0 if _newest_checkpoint(launch.run_dir) != newest else restarts
            if restarts == launch.max_restarts:
                _say(
                    f"giving up after --max-restarts {restarts} without a new checkpoint; the logs are in {launch.logs}"
                )
                return EXIT_FAULT
            restarts += 1
            _say(f"starting again, {restarts} of {launch.max_restarts} without a new checkpoint")


class _Stop:
    """Requests to stop that this process gets while it is entered as a context."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at = 0.0
        self.second_at: float | None = None

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def is_requested(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.at = signal.Signals(number), now
        elif now - self.at > SAME_REQUEST_SECONDS and self.second_at is None:
            self.second_at = now


class _Group:
    """One start of torchrun and its ranks."""

    def __init__(self, launch: Launch, folder: Path, stop: _Stop) -> None:
        self._launch = launch
        self._folder = folder
        self._stop = stop
        self._asked: dict[int, int] = {}
        self._is_out_of_grace = False
        self._agent_log = launch.logs / "torchrun.log"
        launch.logs.mkdir(parents=True, exist_ok=True)

    def run(self) -> Ending:
        """Runs it to its end."""
        with self._shown_output() as show:
            self._agent = self._start()
            while self._agent.poll() is None:
                self._pass_on_requests()
                show()
                time.sleep(POLL_SECONDS)
            self._wait_for_ranks()
            show()
        return self._ending()

    def _start(self) -> subprocess.Popen[bytes]:
        launcher = os.getpid()
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

        def begin() -> None:
            if prctl is not None:
                prctl(rank_script.PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != launcher:
                    os._exit(1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

        with self._agent_log.open("ab") as log:
            self._agent_log_start = log.tell()
            return subprocess.Popen(
                torchrun_words(self._launch, self._folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_own_variables(self._launch, self._folder)},
                preexec_fn=begin,
                start_new_session=True,  # a terminal's Ctrl-C comes here only
            )

    def _ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        ranks = {int(path.stem.removeprefix("rank-")): path for path in self._folder.glob("rank-*.pid")}
        pids = {rank: int(text) for rank, path in ranks.items() if (text := path.read_text())}
        return {rank: pid for rank, pid in pids.items() if rank_script.parent_of(pid) == self._agent.pid}

    def _pass_on_requests(self) -> None:
        """Asks ranks to stop that were not asked yet; ends them when the time for it is over."""
        stop = self._stop
        if stop.signal is None:
            return
        times = 1 if stop.second_at is None else 2
        for rank, pid in self._ranks().items():
            if self._asked.get(rank, 0) < times:
                self._asked[rank] = times
                os.kill(pid, stop.signal)
        now = time.monotonic()
        self._is_out_of_grace = now > stop.at + self._launch.grace_seconds
        if self._is_out_of_grace or (stop.second_at is not None and now > stop.second_at + SECOND_REQUEST_SECONDS):
            self._agent.kill()  # which takes the ranks with it

    def _wait_for_ranks(self) -> None:
        """Waits until the kernel has ended what torchrun left."""
        pids = [int(text) for path in self._folder.glob("rank-*.pid") if (text := path.read_text())]
        deadline = time.monotonic() + REST_SECONDS
        while any(rank_script.parent_of(pid) is not None for pid in pids) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 10)

    @contextmanager
    def _shown_output(self) -> Iterator[Callable[[], None]]:
        """Gives a function that shows what the main rank, if it is here, has written since the last call."""
        paths = rank_script.output_files(self._launch.logs, 0)
        places = [path.stat().st_size if path.exists() else 0 for path in paths]
        sinks: list[BinaryIO] = [sys.stdout.buffer, sys.stderr.buffer]

        def show() -> None:
            for i, (path, sink) in enumerate(zip(paths, sinks, strict=True)):
                if path.exists():
                    with path.open("rb") as file:
                        file.seek(places[i])
                        shutil.copyfileobj(file, sink)
                        places[i] = file.tell()
                    sink.flush()

        yield show

    def _ending(self) -> Ending:
        outcomes = read_outcomes(self._folder)
        own = sorted((o for o in outcomes if not o.is_consequence), key=lambda outcome: outcome.seconds)
        failed = [outcome for outcome in own if outcome.code not in (0, EXIT_STOPPED)]
        if failed:
            return self._failure(failed[0])
        if self._is_out_of_grace:
            return Ending(
                EXIT_STOPPED,
                f"did not end within the grace of {self._launch.grace_seconds:g} s and was killed; "
                "steps since the last checkpoint are lost, start the same command again with a longer --grace",
            )
        stopped = [outcome for outcome in own if outcome.code == EXIT_STOPPED]
        has_ended_well = self._agent.returncode == 0 and len(own) == self._launch.num_ranks
        if stopped and (has_ended_well or self._stop.is_requested):
            return Ending(EXIT_STOPPED, stopped[0].message)
        if has_ended_well:
            return Ending(0, "")
        # A rank that was asked twice ends at once, without a word to the others or to us.
        if self._stop.is_requested or EXIT_STOPPED in self._reported_codes().values():
            return Ending(EXIT_STOPPED, "stopped on request; start the same command again to go on")
        return Ending(EXIT_FAULT, self._silent_failure(outcomes))

    def _failure(self, outcome: Outcome) -> Ending:
        if outcome.code == EXIT_USER_ERROR:
            return Ending(outcome.code, outcome.message)
        return Ending(outcome.code, f"rank {outcome.rank}: {outcome.message}; its log is {self._log_of(outcome.rank)}")

    def _silent_failure(self, outcomes: list[Outcome]) -> str:
        """What is known of a failure that no rank owned up to."""
        if self._agent.returncode < 0:
            return f"torchrun was killed by {_signal_name(-self._agent.returncode)}, and the ranks with it"
        codes = self._reported_codes()
        for rank, code in codes.items():
            if code < 0 and code != -signal.SIGTERM:  # by which torchrun ends the others
                return f"rank {rank} was killed by {_signal_name(-code)}; its log is {self._log_of(rank)}"
        if outcomes:
            first = min(outcomes, key=lambda outcome: outcome.seconds)
            return f"rank {first.rank}: {first.message}; its log is {self._log_of(first.rank)}"
        for rank, code in codes.items():
            return f"rank {rank} ended with code {code}; its log is {self._log_of(rank)}"
        return f"torchrun ended with code {self._agent.returncode}; its log is {self._agent_log}"

    def _reported_codes(self) -> dict[int, int]:
        """Exit codes by rank as torchrun's closing report has them, the first failure first; minus the signal that killed a rank."""
        with self._agent_log.open("rb") as log:
            log.seek(self._agent_log_start)
            report = log.read().decode(errors="replace")
        found = re.findall(r"^  rank +: (\d+).*\n  exitcode +: (-?\d+)", report, re.MULTILINE)
        return {int(rank): int(code) for rank, code in reversed(found)}

    def _log_of(self, rank: int) -> Path:
        return rank_script.output_files(self._launch.logs, rank)[1]


def _own_variables(launch: Launch, folder: Path) -> dict[str, str]:
    return {
        **ENVIRONMENT,
        **launch.environment,
        rank_script.FOLDER_VARIABLE: str(folder),
        rank_script.LOGS_VARIABLE: str(launch.logs.absolute()),
        rank_script.LAUNCHER_VARIABLE: str(os.getpid()),
    }


def _newest_checkpoint(run_dir: Path) -> str | None:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return checkpoints[-1].name if checkpoints else None


def _signal_name(number: int) -> str:
    return signal.Signals(number).name


def _say(message: str) -> None:
    print(f"spade-t5 launch: {message}", file=sys.stderr, flush=True)

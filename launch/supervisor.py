"""Keeps the ranks of one machine running: starts torchrun, starts it again after a fault, stops it in an orderly way, and says how it ended.

torchrun starts the ranks and ends all when one fails; whether they start again is decided here, for torchrun knows neither exit codes nor
checkpoints. Signals go from here straight to the ranks, because torchrun would end with a failure, and a second one would break it off. What
dies takes what it started with it: torchrun asks the kernel to be killed with this process, the ranks with torchrun.
"""

import ctypes
import fcntl
import itertools
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from spade_t5.checkpoint import list_checkpoints
from spade_t5.errors import ConfigError
from spade_t5.launch import rank as rank_script
from spade_t5.launch.cli import EXIT_FAULT, EXIT_USER_ERROR
from spade_t5.training.outcome import Outcome, read_outcomes
from spade_t5.training.stopping import EXIT_STOPPED, SAME_REQUEST_SECONDS, SIGNALS, SignalHandler

POLL_SECONDS = 0.1
REST_SECONDS = 10.0
"""How long the other ranks have to end once one has failed; they cannot go on, and have nothing to save."""
STATE_PREFIX = "spade-t5-launch-"
"""Of the temporary folders of launchers."""
YOUNG_SECONDS = 60.0
"""A temporary folder may be so old without being locked by its launcher yet."""
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
    """Folder in which each launch makes one of its own for the ranks' output."""
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
    start = Start(folder=folder, logs=launch.logs, attempt=0, began=time.monotonic())
    variables = [f"{name}={shlex.quote(value)}" for name, value in _own_variables(launch, start).items()]
    return " \\\n  ".join([*variables, shlex.join(torchrun_words(launch, folder))])


class Start(NamedTuple):
    """What one start of the ranks has of its own."""

    folder: Path
    """Temporary folder, in which ranks tell their process ids and how they ended."""
    logs: Path
    """Folder of the ranks' output, of this launch alone."""
    attempt: int
    """Starts before this one."""
    began: float
    """When the launcher began, by the monotonic clock in seconds."""


def supervise(launch: Launch) -> int:
    """Runs the ranks to their end, over faults, and returns the exit code; what happened is written to the standard error.

    Raises:
        ConfigError: the folder of the ranks' output cannot be made.
    """
    began, restarts = time.monotonic(), 0
    _remove_left_folders()
    logs = _make_logs(launch.logs)
    run_folder = _identity(launch.run_dir)
    with _Stop() as stop:
        for attempt in itertools.count():
            newest = _newest_checkpoint(launch.run_dir)
            with _state_folder() as folder:
                ending = _Group(launch, Start(folder, logs, attempt, began), stop).run()
            if ending.message:
                _say(ending.message)
            if ending.code == EXIT_USER_ERROR and attempt == 0:  # a refused run leaves its folder as it was
                shutil.rmtree(logs, ignore_errors=True)
            if ending.code != EXIT_FAULT or stop.is_requested:
                return ending.code
            newest_now = _newest_checkpoint(launch.run_dir)
            if _identity(launch.run_dir) != run_folder or (newest is not None and newest_now is None):
                _say(
                    f"the run folder or its checkpoints are gone: {launch.run_dir}; see what removed them, nothing is started again"
                )
                return EXIT_FAULT
            restarts = 0 if newest_now != newest else restarts
            if restarts == launch.max_restarts:
                _say(f"giving up after --max-restarts {restarts} without a new checkpoint; the logs are in {logs}")
                return EXIT_FAULT
            restarts += 1
            _say(f"starting again, {restarts} of {launch.max_restarts} without a new checkpoint")
    raise AssertionError("the loop ends by returning")


class _Stop(SignalHandler):
    """Requests to stop that this process gets while it is entered as a context."""

    def __init__(self) -> None:
        is_under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        super().__init__(SIGNALS if is_under_nohup else (*SIGNALS, signal.SIGHUP))
        self.signal: signal.Signals | None = None
        self.at = 0.0
        self.second_at: float | None = None

    @property
    def is_requested(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            # The ranks have no terminal that could go, so they know no SIGHUP.
            self.signal = signal.SIGTERM if number == signal.SIGHUP else signal.Signals(number)
            self.at = now
        elif now - self.at > SAME_REQUEST_SECONDS and self.second_at is None:
            self.second_at = now


class _Group:
    """One start of torchrun and its ranks."""

    def __init__(self, launch: Launch, start: Start, stop: _Stop) -> None:
        self._launch = launch
        self._own = start
        self._stop = stop
        self._pids: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._is_out_of_grace = False
        self._agent_log = start.logs / "torchrun.log"

    def run(self) -> Ending:
        """Runs it to its end."""
        with ExitStack() as stack:
            # Open all the time, for somebody may remove the folder.
            self._agent_output = stack.enter_context(self._agent_log.open("a+b"))
            self._agent_output_start = self._agent_output.seek(0, os.SEEK_END)
            show = stack.enter_context(self._shown_output())
            self._agent = self._start()
            while self._agent.poll() is None:
                self._note_pids()
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

        return subprocess.Popen(
            torchrun_words(self._launch, self._own.folder),
            stdin=subprocess.DEVNULL,
            stdout=self._agent_output,
            stderr=self._agent_output,
            env={**os.environ, **_own_variables(self._launch, self._own)},
            preexec_fn=begin,
            start_new_session=True,  # a terminal's Ctrl-C comes here only
        )

    def _note_pids(self) -> None:
        """Learns the process ids of ranks that have begun, and keeps them: what is temporary may be cleared away during a long run."""
        if len(self._pids) < self._launch.num_ranks:
            for path in self._own.folder.glob("rank-*.pid"):
                with suppress(OSError, ValueError):
                    self._pids[int(path.stem.removeprefix("rank-"))] = int(path.read_text())

    def _ranks(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        return {rank: pid for rank, pid in self._pids.items() if rank_script.parent_of(pid) == self._agent.pid}

    def _pass_on_requests(self) -> None:
        """Asks ranks to stop that were not asked yet; ends them when the time for it is over."""
        stop = self._stop
        if stop.signal is None:
            return
        times = 1 if stop.second_at is None else 2
        for rank, pid in self._ranks().items():
            if self._asked.get(rank, 0) < times:
                self._asked[rank] = times
                with suppress(ProcessLookupError):
                    os.kill(pid, stop.signal)
        now = time.monotonic()
        self._is_out_of_grace = now > stop.at + self._launch.grace_seconds
        if self._is_out_of_grace or (stop.second_at is not None and now > stop.second_at + SECOND_REQUEST_SECONDS):
            self._agent.kill()  # which takes the ranks with it

    def _wait_for_ranks(self) -> None:
        """Waits until the kernel has ended what torchrun left."""
        self._note_pids()
        deadline = time.monotonic() + REST_SECONDS
        while (
            any(rank_script.parent_of(pid) is not None for pid in self._pids.values()) and time.monotonic() < deadline
        ):
            time.sleep(POLL_SECONDS / 10)

    @contextmanager
    def _shown_output(self) -> Iterator[Callable[[], None]]:
        """Gives a function that shows what the main rank, if it is here, has written since the last call."""
        with ExitStack() as stack:
            # Where it is written, by stream: standard output and standard error, until nobody reads it.
            shown = dict(zip((1, 2), rank_script.output_files(self._own.logs, 0), strict=True))
            files = {}
            for stream, path in shown.items():
                files[stream] = stack.enter_context(path.open("a+b"))
                files[stream].seek(0, os.SEEK_END)

            def show() -> None:
                for stream, file in list(files.items()):
                    while block := file.read(2**16):
                        if not _write(stream, block):
                            del files[stream]
                            break

            yield show

    def _ending(self) -> Ending:
        outcomes = read_outcomes(self._own.folder)
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
        if has_ended_well and not stopped:
            return Ending(0, "")
        if has_ended_well or self._stop.is_requested or self._did_one_stop_first(outcomes):
            # A rank that was asked twice, or as it began, ends at once, without a word to the others or to us.
            return Ending(
                EXIT_STOPPED,
                stopped[0].message if stopped else "stopped on request; start the same command again to go on",
            )
        return Ending(EXIT_FAULT, self._silent_failure(outcomes))

    def _did_one_stop_first(self, outcomes: list[Outcome]) -> bool:
        """Whether what ended the ranks was that one of them was asked to stop: torchrun asks the others to, whatever became of the first."""
        codes = self._reported_codes()
        said = {outcome.rank for outcome in outcomes}
        has_died = any(code not in (EXIT_STOPPED, -signal.SIGTERM) for rank, code in codes.items() if rank not in said)
        if has_died or self._agent.returncode < 0:
            return False
        if outcomes and min(outcomes, key=lambda outcome: outcome.seconds).code != EXIT_STOPPED:
            return EXIT_STOPPED in [code for rank, code in codes.items() if rank not in said]
        return bool(outcomes) or EXIT_STOPPED in codes.values()

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
        self._agent_output.seek(self._agent_output_start)
        report = self._agent_output.read().decode(errors="replace")
        found = re.findall(r"^  rank +: (\d+).*\n  exitcode +: (-?\d+)", report, re.MULTILINE)
        return {int(rank): int(code) for rank, code in reversed(found)}

    def _log_of(self, rank: int) -> Path:
        return rank_script.output_files(self._own.logs, rank)[1]


def _own_variables(launch: Launch, start: Start) -> dict[str, str]:
    return {
        **ENVIRONMENT,
        **launch.environment,
        rank_script.FOLDER_VARIABLE: str(start.folder),
        rank_script.LOGS_VARIABLE: str(start.logs.absolute()),
        rank_script.ATTEMPT_VARIABLE: str(start.attempt),
        rank_script.BEGAN_VARIABLE: repr(start.began),
        rank_script.LAUNCHER_VARIABLE: str(os.getpid()),
    }


def _make_logs(logs: Path) -> Path:
    """Makes the folder of this launch's logs, which it shares with no other."""
    folder = logs / f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.uname().nodename}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--log-dir: {folder} cannot be made ({error.strerror}); choose another folder") from None
    return folder


@contextmanager
def _state_folder() -> Iterator[Path]:
    """A temporary folder, locked: by that others see that its launcher lives, and systemd-tmpfiles lets it alone."""
    with tempfile.TemporaryDirectory(prefix=STATE_PREFIX, ignore_cleanup_errors=True) as name:
        descriptor = os.open(name, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(descriptor)


def _remove_left_folders() -> None:
    """Removes the temporary folders of launchers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{STATE_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < YOUNG_SECONDS:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _identity(folder: Path) -> int | None:
    """A number that a folder made anew under the same name does not have; None if it is gone."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def _newest_checkpoint(run_dir: Path) -> str | None:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return checkpoints[-1].name if checkpoints else None


def _signal_name(number: int) -> str:
    return signal.Signals(number).name


def _say(message: str) -> None:
    _write(2, f"spade-t5 launch: {message}\n".encode(errors="backslashreplace"))


def _write(stream: int, block: bytes) -> bool:
    """Writes to the standard output or error; whether it can still be written: its reader, or the terminal, may be gone."""
    try:
        while block:
            block = block[os.write(stream, block) :]
    except OSError:
        return False
    return True

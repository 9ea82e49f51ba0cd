"""One start of torchrun and of the ranks of this machine.

torchrun starts the ranks and ends all when one fails. It is told of one machine only and opens no port: which place the ranks have among those of
other machines is for `rank.py` to say. Signals go from here straight to the ranks, because torchrun would end with a failure, and a second one
would break it off. What dies takes what it started with it: torchrun asks the kernel to be killed with this process, the ranks with torchrun.
"""

import ctypes
import fcntl
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
from types import TracebackType
from typing import NamedTuple, Self

from spade_t5.launch import rank as rank_script
from spade_t5.launch.ending import GroupEnd
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.terminal import write
from spade_t5.training.outcome import read_outcomes
from spade_t5.training.stopping import SIGNALS

POLL_SECONDS = 0.1
REST_SECONDS = 10.0
"""How long the other ranks have to end once one has failed; they cannot go on, and have nothing to save."""
STATE_PREFIX = "spade-t5-launch-"
"""Of the temporary folders of launchers."""
YOUNG_SECONDS = 60.0
"""A temporary folder may be so old without being locked by its launcher yet."""
SECOND_REQUEST_SECONDS = 4.0
"""How long ranks have to end after a second request to stop."""
LOOPBACK = "127.0.0.1"

ENVIRONMENT = {
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the first rank makes the store; torchrun's would remember ranks that are gone
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """What the ranks of this machine are to run."""

    command: Sequence[str]
    """Words of the `spade-t5` command that every rank runs."""
    num_ranks: int
    """Ranks on this machine."""
    environment: dict[str, str]
    """Variables of the ranks, beside those of this process."""
    grace_seconds: float
    """How long they have to save and end once they are asked to stop."""


class Place(NamedTuple):
    """Where the ranks of this machine stand among those of all machines."""

    node: int
    """Number of this machine."""
    num_nodes: int
    """Machines in all."""
    first_rank: int
    """Number of its first rank."""
    world_size: int
    """Ranks of all machines."""
    address: str
    """Of the first rank, where all meet."""
    port: int
    """Likewise."""


class Start(NamedTuple):
    """What one start of the ranks has of its own."""

    logs: Path
    """Folder of the ranks' output, of this launch alone."""
    attempt: int
    """Starts before this one."""
    began: float
    """When the launcher began, by the monotonic clock of this machine in seconds."""
    place: Place | None
    """None: there are no other machines."""


def describe(ranks: Ranks, start: Start) -> str:
    """The command that starts the ranks, and its environment, to be shown instead of started."""
    folder = Path(tempfile.gettempdir()) / "FOLDER"
    variables = [f"{name}={shlex.quote(value)}" for name, value in _own_variables(ranks, start, folder).items()]
    return " \\\n  ".join([*variables, shlex.join(_torchrun_words(ranks, folder))])


class Group:
    """Torchrun and the ranks of this machine; they run while it is entered as a context."""

    def __init__(self, ranks: Ranks, start: Start, stop: LauncherStop) -> None:
        """Prepares a start; `stop` tells whether the ranks are to stop."""
        self._ranks, self._own, self._stop = ranks, start, stop
        self._first_rank = 0 if start.place is None else start.place.first_rank
        self._pids: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._is_out_of_grace = False
        self._ends_at: float | None = None
        self._was_ended = False
        node = "" if start.place is None else f"-{start.place.node:05d}"
        self._agent_log = start.logs / f"torchrun{node}.log"

    def __enter__(self) -> Self:
        """Starts them."""
        with ExitStack() as stack:
            self._folder = stack.enter_context(_state_folder())
            # Open all the time, for somebody may remove the folder.
            self._agent_output = stack.enter_context(self._agent_log.open("a+b"))
            self._agent_output_start = self._agent_output.seek(0, os.SEEK_END)
            self._show = stack.enter_context(self._shown_output())
            self._agent = self._start()
            stack.callback(self._wait_for_ranks)
            stack.callback(self.kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kills what still runs."""
        self._stack.close()

    def poll(self) -> GroupEnd | None:
        """Passes requests on, shows what the main rank has written, and returns how all ended once they have."""
        is_running = self._agent.poll() is None
        if is_running:
            self._note_pids()
            self._pass_on_requests()
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                self._was_ended = True
                self.kill()
            self._show()
            return None
        self._wait_for_ranks()
        self._show()
        return GroupEnd(
            num_ranks=self._ranks.num_ranks,
            outcomes=read_outcomes(self._folder),
            agent_code=self._agent.returncode,
            reported_codes=self._reported_codes(),
            agent_log=str(self._agent_log),
            is_out_of_grace=self._is_out_of_grace,
            was_ended=self._was_ended,
        )

    def end_soon(self) -> None:
        """Leaves the ranks, which have lost others, a moment to end by themselves, and then kills them."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + REST_SECONDS

    def kill(self) -> None:
        """Kills torchrun, which takes the ranks with it."""
        self._agent.kill()
        self._agent.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        def begin() -> None:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

        return popen_tied(
            _torchrun_words(self._ranks, self._folder),
            begin=begin,
            stdin=subprocess.DEVNULL,
            stdout=self._agent_output,
            stderr=self._agent_output,
            env={**os.environ, **_own_variables(self._ranks, self._own, self._folder)},
        )

    def _note_pids(self) -> None:
        """Learns the process ids of ranks that have begun, and keeps them: what is temporary may be cleared away during a long run."""
        if len(self._pids) < self._ranks.num_ranks:
            for path in self._folder.glob("rank-*.pid"):
                with suppress(OSError, ValueError):
                    self._pids[int(path.stem.removeprefix("rank-"))] = int(path.read_text())

    def _running(self) -> dict[int, int]:
        """Process ids of the ranks that run."""
        return {rank: pid for rank, pid in self._pids.items() if rank_script.parent_of(pid) == self._agent.pid}

    def _pass_on_requests(self) -> None:
        """Asks ranks to stop that were not asked yet; ends them when the time for it is over."""
        stop = self._stop
        if stop.signal is None:
            return
        for rank, pid in self._running().items():
            if self._asked.get(rank, 0) < stop.times:
                self._asked[rank] = stop.times
                with suppress(ProcessLookupError):
                    os.kill(pid, stop.signal)
        now = time.monotonic()
        self._is_out_of_grace = now > stop.at + self._ranks.grace_seconds
        if self._is_out_of_grace or (stop.second_at is not None and now > stop.second_at + SECOND_REQUEST_SECONDS):
            self.kill()

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
            files = {}
            # Where it is written, by stream: standard output and standard error, until nobody reads it.
            if self._first_rank == 0:
                for stream, path in zip((1, 2), rank_script.output_files(self._own.logs, 0), strict=True):
                    files[stream] = stack.enter_context(path.open("a+b"))
                    files[stream].seek(0, os.SEEK_END)

            def show() -> None:
                for stream, file in list(files.items()):
                    while block := file.read(2**16):
                        if not write(stream, block):
                            del files[stream]
                            break

            yield show

    def _reported_codes(self) -> dict[int, int]:
        self._agent_output.seek(self._agent_output_start)
        report = self._agent_output.read().decode(errors="replace")
        found = re.findall(r"^  rank +: (\d+).*\n  exitcode +: (-?\d+)", report, re.MULTILINE)
        return {self._first_rank + int(rank): int(code) for rank, code in reversed(found)}


def popen_tied(
    words: Sequence[str], *, begin: Callable[[], None] = lambda: None, **options: object
) -> subprocess.Popen[bytes]:
    """Starts a process that the kernel kills when this one dies, and that a terminal's Ctrl-C does not reach.

    Args:
        words: its command.
        begin: what it does first.
        options: those of `subprocess.Popen`.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def tie() -> None:
        if prctl is not None:
            prctl(rank_script.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
        begin()

    return subprocess.Popen(words, preexec_fn=tie, start_new_session=True, **options)  # type: ignore[call-overload]


def remove_left_folders() -> None:
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


def _torchrun_words(ranks: Ranks, folder: Path) -> list[str]:
    """The command that starts the ranks."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(ranks.num_ranks)),
        # A file in place of a port: torchrun would open one to the whole network.
        *("--nnodes", "1"),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-conf", "store_type=file"),
        *("--rdzv-endpoint", str(folder / "meeting")),
        *("--rdzv-id", "local"),
        *("--local-addr", LOOPBACK),
        *("--max-restarts", "0"),
        *("--shutdown-timeout", f"{REST_SECONDS:g}"),
        *("--signals-to-handle", "SIGQUIT"),
        rank_script.__file__,
        *ranks.command,
    ]


def _own_variables(ranks: Ranks, start: Start, folder: Path) -> dict[str, str]:
    return {
        **ENVIRONMENT,
        **ranks.environment,
        rank_script.FOLDER_VARIABLE: str(folder),
        rank_script.LOGS_VARIABLE: str(start.logs.absolute()),
        rank_script.ATTEMPT_VARIABLE: str(start.attempt),
        rank_script.BEGAN_VARIABLE: repr(start.began),
        rank_script.LAUNCHER_VARIABLE: str(os.getpid()),
        **({} if start.place is None else {rank_script.PLACE_VARIABLE: ",".join(map(str, start.place))}),
    }


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

"""Real groups of ranks that start in a fraction of a second and can be killed at any moment.

    with launch_ranks(["pretrain", "demo", ...], num_ranks=2, log_dir=tmp_path / "logs") as group:
        group.kill(1)
        assert group.wait() == [1, -9]

One server a test process imports PyTorch, DeepSpeed and this package once. Each group has a launcher of its own that behaves as torchrun: it
forks the ranks, sets their environment, ends the others when one fails, and takes them with it when it is killed. A rank's files are
`rank-N.out` and `rank-N.err` in `log_dir`.

A hook is a function that every rank calls first, to break something: it installs an audit hook, replaces `os.fsync`, poisons an objective.
Hooks and functions are loaded from the file they stand in, so they are defined at the top level of a test file or of a file beside it, and
take JSON values by name.
"""

import contextlib
import functools
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from spade_t5.testing.processes import free_port
from spade_t5.testing.rank_server import EXIT_CODES

SERVER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # a process that has touched a GPU cannot fork
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RankGroup:
    """A launcher and its ranks; as a context it leaves nothing running."""

    def __init__(self, launcher: int, ranks: Sequence[int], log_dir: Path) -> None:
        """Takes hold of processes that the server has just started."""
        self.launcher = launcher
        """Process id of the launcher, which is also the session and process group of all."""
        self.ranks = tuple(ranks)
        """Process ids of the ranks, in rank order."""
        self.log_dir = log_dir
        self.started = time.monotonic()
        try:
            self._descriptor: int | None = os.pidfd_open(launcher)
        except ProcessLookupError:
            self._descriptor = None

    def __enter__(self) -> Self:
        """Nothing to do: the group runs."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kills what is left."""
        self._kill_session()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def wait(self, timeout_seconds: float = 180) -> list[int | None]:
        """Waits for the launcher's end.

        Returns:
            the exit code of every rank, minus the number of the signal where one killed it; None for all if the launcher was killed.

        Raises:
            AssertionError: time is up; everything is killed, and the message has the ends of the ranks' output.
        """
        if not self._has_ended(timeout_seconds):
            self._kill_session()
            raise AssertionError(f"ranks ran past {timeout_seconds} s\n{self.errors()}")
        codes = self.log_dir / EXIT_CODES
        return json.loads(codes.read_text()) if codes.exists() else [None] * len(self.ranks)

    def is_running(self) -> bool:
        """Whether the launcher still runs."""
        return not self._has_ended(0)

    def kill(self, what: int | Literal["launcher", "all"], number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank, to the launcher alone, or to every process of the group (loader workers too) at once."""
        with contextlib.suppress(ProcessLookupError):
            if what == "all":
                os.killpg(self.launcher, number)
            else:
                os.kill(self.launcher if what == "launcher" else self.ranks[int(what)], number)

    def stdout(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.log_dir / f"rank-{rank}.out").read_text(encoding="utf-8", errors="replace")

    def stderr(self, rank: int) -> str:
        """What a rank has logged, and its traceback."""
        return (self.log_dir / f"rank-{rank}.err").read_text(encoding="utf-8", errors="replace")

    def errors(self) -> str:
        """The ends of what the ranks have logged, for messages."""
        return "\n".join(f"rank {rank}: {self.stderr(rank)[-3000:]}" for rank in range(len(self.ranks)))

    def living(self) -> dict[int, str]:
        """Processes of the group that are not dead: launcher, ranks and whatever they started; id to name."""
        return {pid: name for pid in _processes() if (name := _living_in_session(pid, self.launcher)) is not None}

    def assert_gone(self, within_seconds: float = 2) -> float:
        """Asserts that no process of the group is left, loader workers included; returns the seconds that it took."""
        started = time.monotonic()
        while living := self.living():
            assert time.monotonic() - started <= within_seconds, f"still running after {within_seconds} s: {living}"
            time.sleep(0.02)
        return time.monotonic() - started

    def _has_ended(self, timeout_seconds: float) -> bool:
        if self._descriptor is None:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout_seconds * 1000))

    def _kill_session(self) -> None:
        while living := self.living():
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def launch_ranks(
    argv: Sequence[str],
    *,
    num_ranks: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    hook: Callable[..., None] | None = None,
    hook_arguments: Mapping[str, Any] | None = None,
    grace_seconds: float = 5,
) -> RankGroup:
    """Starts `spade-t5 argv...` on ranks of this machine.

    Args:
        argv: words of the command.
        num_ranks: ranks, one process each.
        log_dir: folder of the ranks' output, made anew if it is not there.
        env: environment variables beside those of this process.
        hook: called by every rank before the command; a function at the top level of a file.
        hook_arguments: JSON values that it is called with.
        grace_seconds: how long the others have to end once a rank has failed.
    """
    work = {"argv": list(argv), "function": None, "hook": hook and _function(hook, hook_arguments)}
    return _launch(work, num_ranks, log_dir, env, grace_seconds)


def call_on_ranks(
    function: Callable[..., Any],
    arguments: Mapping[str, Any] | None = None,
    *,
    num_ranks: int,
    log_dir: Path,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 180,
) -> list[Any]:
    """Calls a function of a test file on every rank, without a process group, and returns what they returned (JSON values), in rank order.

    Raises:
        AssertionError: a rank failed, or time is up.
    """
    work = {"argv": None, "function": _function(function, arguments), "hook": None}
    with _launch(work, num_ranks, log_dir, env, 5) as group:
        codes = group.wait(timeout_seconds)
        assert codes == [0] * num_ranks, f"exit codes {codes}\n{group.errors()}"
    return [json.loads((log_dir / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def _launch(
    work: dict[str, Any], num_ranks: int, log_dir: Path, env: Mapping[str, str] | None, grace_seconds: float
) -> RankGroup:
    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / EXIT_CODES).unlink(missing_ok=True)
    for rank in range(num_ranks):  # there from the beginning, for those who watch what is printed
        for kind in ("out", "err"):
            (log_dir / f"rank-{rank}.{kind}").write_bytes(b"")
    environment = {**os.environ, **SERVER_ENVIRONMENT, "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), **(env or {})}
    answer = _server().ask(
        {
            **work,
            "num_ranks": num_ranks,
            "log_dir": str(log_dir.resolve()),
            "cwd": os.getcwd(),
            "env": environment,
            "grace_seconds": grace_seconds,
        }
    )
    return RankGroup(answer["launcher"], answer["ranks"], log_dir)


class _Server:
    """The process that forks launchers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from spade_t5.testing.rank_server import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **SERVER_ENVIRONMENT},
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then end the server's input
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The launcher's answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, f"the server of ranks ended with code {self._process.wait()}"
        return json.loads(line)


@functools.cache
def _server() -> _Server:
    return _Server()


def _function(function: Callable[..., Any], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    file = inspect.getsourcefile(function)
    assert file is not None, f"{function} is in no file"
    assert "." not in function.__qualname__, f"{function.__qualname__} is not at the top level of its file"
    return {"file": str(Path(file).resolve()), "name": function.__name__, "arguments": dict(arguments or {})}


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _living_in_session(pid: int, session: int) -> str | None:
    """Name of a process if it is in the session and not dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    state, _, _, of_session = rest.split()[:4]
    return name if state not in "ZX" and int(of_session) == session else None

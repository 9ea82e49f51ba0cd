"""Runs commands and groups of ranks for tests, with a time limit and no process left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """A TCP port on the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a command in its own process group and returns its exit code and output; the group is killed when time is up."""
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"{' '.join(command)} ran past {timeout_seconds} s\n{out[-4000:]}\n{err[-4000:]}"
        ) from None
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def torchrun(
    arguments: Sequence[str], *, num_ranks: int, env: Mapping[str, str] | None = None, timeout_seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments...` as `num_ranks` ranks on this machine through torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return run_command([*launcher, *arguments], env=env, timeout_seconds=timeout_seconds)

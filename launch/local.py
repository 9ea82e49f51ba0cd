"""All ranks on this machine, reachable from nowhere else."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spade_t5.launch.supervisor import Launch

LOOPBACK = "127.0.0.1"


def local_launch(
    command: Sequence[str], *, num_ranks: int, run_dir: Path, logs: Path, max_restarts: int, grace_seconds: float
) -> Launch:
    """A launch of `num_ranks` ranks here; the values are those of `Launch`."""
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_ranks, 1)))
    return Launch(
        command=command,
        num_ranks=num_ranks,
        meeting=_meeting,
        environment=environment,
        run_dir=run_dir,
        logs=logs,
        max_restarts=max_restarts,
        grace_seconds=grace_seconds,
    )


def _meeting(folder: Path) -> list[str]:
    # A file in place of a port: torchrun would open one to the whole network.
    return [
        *("--nnodes", "1"),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-conf", "store_type=file"),
        *("--rdzv-endpoint", str(folder / "meeting")),
        *("--rdzv-id", "local"),
        *("--local-addr", LOOPBACK),
    ]

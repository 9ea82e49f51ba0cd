"""All processes on this machine, reachable from nowhere else."""

import argparse
import os
import sys
import time
from pathlib import Path

from spade_t5.launch import options
from spade_t5.launch.accelerate_config import add_shape_option, take_over_shape
from spade_t5.launch.ending import Ending, ending_of
from spade_t5.launch.group import POLL_SECONDS, Group, Ranks, Start, describe
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.supervisor import supervise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes on this machine")
    add_shape_option(parser)
    options.add_supervision(parser)
    options.add_grace(parser)
    options.add_command(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command on this machine, and returns the exit code of the run."""
    take_over_shape(arguments)
    options.check_least(arguments, nproc_per_node=1, grace=1)
    supervision = options.supervision_of(arguments)
    ranks = Ranks(
        command=arguments.words,
        num_ranks=arguments.nproc_per_node,
        environment={
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
            "OMP_NUM_THREADS": threads_per_rank(arguments.nproc_per_node),
        },
        grace_seconds=arguments.grace,
    )
    began = time.monotonic()
    if arguments.dry_run:
        print(describe(ranks, Start(logs=supervision.logs, attempt=0, began=began, place=None)))
        return 0
    with LauncherStop() as stop:
        return supervise(
            supervision, lambda number, logs: _attempt(ranks, Start(logs, number, began, None), stop), stop
        )


def threads_per_rank(num_ranks: int) -> str:
    """Threads for each rank's products on a CPU: an equal share of the cores, unless the user has set it."""
    return os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // num_ranks, 1)))


def _attempt(ranks: Ranks, start: Start, stop: LauncherStop) -> Ending:
    with Group(ranks, start, stop) as group:
        while (end := group.poll()) is None:
            time.sleep(POLL_SECONDS)
    return ending_of(
        [end],
        logs=Path(start.logs),
        is_stop_requested=stop.is_requested,
        grace_seconds=ranks.grace_seconds,
    )

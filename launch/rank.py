"""What `spade-t5 launch` has torchrun start as every rank: ties the process to its launcher, then becomes `python -m spade_t5.launch`.

It runs as a script, before anything of this package or PyTorch is imported: a launcher that dies while its ranks import them must not leave them
behind, and what goes wrong in those seconds belongs into the rank's log as well. So it knows nothing but the standard library.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

FOLDER_VARIABLE = "SPADE_T5_RANK_FOLDER"
"""Folder of this machine and attempt: process ids of the ranks, and how they ended."""
LOGS_VARIABLE = "SPADE_T5_RANK_LOGS"
"""Folder of the ranks' standard output and error."""
LAUNCHER_VARIABLE = "SPADE_T5_LAUNCHER_PID"
"""Process id of the launcher, whose child torchrun is, whose children the ranks are."""

PLACE_VARIABLE = "SPADE_T5_PLACE"
"""Where the ranks of this machine stand among those of others: node, nodes, first rank, ranks in all, address and port of the first; absent
where there are no other machines."""
NODE_VARIABLE = "SPADE_T5_NODE"
"""Name of this machine in a launch on many."""
ATTEMPT_VARIABLE = "SPADE_T5_ATTEMPT"
"""How often the launcher has started the ranks again."""
BEGAN_VARIABLE = "SPADE_T5_BEGAN"
"""When the launcher began, by the monotonic clock of this machine in seconds."""

PR_SET_PDEATHSIG = 1
EXIT_STOPPED = 75  # as in spade_t5/training/stopping.py, which would import PyTorch


def output_files(logs: Path, rank: int) -> tuple[Path, Path]:
    """Files of a rank's standard output and standard error."""
    return logs / f"rank-{rank:05d}.out", logs / f"rank-{rank:05d}.err"


def parent_of(pid: int) -> int | None:
    """Process id of a process's parent; None if it does not run."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(parent)


def die_with(process: int, *, as_grandparent: bool = False) -> None:
    """Asks the kernel to kill this process when its parent dies, and ends it if that happened already.

    Args:
        process: process id that the parent must have, or the parent's parent.
        as_grandparent: whether it is the parent's parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()
    if (parent_of(parent) if as_grandparent else parent) != process:
        os._exit(1)


def _stop_early(number: int, frame: FrameType | None) -> None:
    """A request to stop while the rank imports its modules."""
    os._exit(EXIT_STOPPED)


def take_place() -> None:
    """Turns torchrun's variables, which speak of this machine alone, into those of all machines."""
    place = os.environ.get(PLACE_VARIABLE)
    if place is None:
        return
    node, num_nodes, first_rank, world_size, address, port = place.split(",")
    rank = str(int(first_rank) + int(os.environ["LOCAL_RANK"]))
    os.environ.update(
        RANK=rank,
        ROLE_RANK=rank,
        WORLD_SIZE=world_size,
        ROLE_WORLD_SIZE=world_size,
        GROUP_RANK=node,
        GROUP_WORLD_SIZE=num_nodes,
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


def main() -> None:
    """Begins a rank."""
    # torchrun ignores these, so that a scheduler that signals every process does not break it off; what is ignored is inherited.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop_early)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with(int(os.environ[LAUNCHER_VARIABLE]), as_grandparent=True)
    take_place()
    rank = int(os.environ["RANK"])
    for stream, path in enumerate(output_files(Path(os.environ[LOGS_VARIABLE]), rank), 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream)
        os.close(file)
    Path(os.environ[FOLDER_VARIABLE], f"rank-{rank}.pid").write_text(str(os.getpid()))
    sys.path[0] = os.getcwd()  # as `python -m` has it, instead of the folder of this file
    runpy.run_module("spade_t5.launch", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

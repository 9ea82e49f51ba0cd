"""Ranks: who this process is, and the few collectives that the engine needs.

Processes are started by torchrun, `accelerate launch` or a scheduler that sets RANK, WORLD_SIZE and LOCAL_RANK. Every function also
works in one process without a process group.
"""

import ctypes
import gc
import os
import signal
import sys
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from spade_t5.errors import ConfigError

PR_SET_PDEATHSIG = 1

T = TypeVar("T")


def launched_world_size() -> int:
    """Number of processes that the launcher started, from its environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the files that all share."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator that belongs to this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sums a short list of numbers over the ranks, in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds a tensor up over the ranks, in place and without waiting for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def differs(values: torch.Tensor) -> bool:
    """Whether any rank holds other integers than the rest."""
    if not dist.is_initialized():
        return False
    bounds = torch.stack([values, -values])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return bool((bounds[0] != -bounds[1]).any())


def gather_objects(item: T) -> list[T]:
    """`item` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items = [item] * world_size()
    dist.all_gather_object(items, item)
    return items


def die_with_parent() -> None:
    """Asks the kernel to kill this rank when its launcher dies, so that no orphan goes on writing to the run folder."""
    if sys.platform == "linux" and launched_world_size() > 1:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def check_world_size() -> None:
    """Refuses a process group whose size is not the launched one: each rank would train alone on the same run folder.

    Raises:
        ConfigError: the sizes differ.
    """
    if world_size() != launched_world_size():
        raise ConfigError(
            f"world size: {launched_world_size()} processes were launched but the process group has {world_size()}; "
            "set training.deepspeed, which several processes need"
        )


def join() -> None:
    """Joins the process group that the launcher started, if it started several processes and none is joined yet."""
    if launched_world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(backend_name())


def backend_name() -> str:
    """Collectives of this machine: NCCL beside gloo where there are GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def shutdown() -> None:
    """Leaves the process group; without it gloo's threads may abort the process at its end."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # engines hold further groups in reference cycles


def end_process(code: int) -> NoReturn:
    """Ends a rank at once, its work being done and its output written.

    At the interpreter's own shutdown, threads of gloo groups that something still refers to abort the process now and then
    ("terminate called without an active exception"), and the launcher takes that for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Ranks: who this process is, and the few collectives that the engine needs.

Processes are started by torchrun, `accelerate launch` or a scheduler that sets RANK, WORLD_SIZE and LOCAL_RANK. Every function also
works in one process without a process group.
"""

import contextlib
import ctypes
import errno
import gc
import ipaddress
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from spade_t5.errors import ConfigError, RunAbortedError
from spade_t5.messages import shown

PR_SET_PDEATHSIG = 1
DEFAULT_TIMEOUT_SECONDS = 1800.0
"""Of collectives outside training."""
TIMEOUT_MARGIN_SECONDS = 120.0
"""How much longer than the watchdog collectives wait, so that it speaks first."""

_SIGNS_OF_LOST_PEERS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out",
    "timed out",
    "refused",
    "Socket closed",
)

T = TypeVar("T")

Context = Callable[[], contextlib.AbstractContextManager[Any]]
_context_of_collectives: Context = contextlib.nullcontext


@contextlib.contextmanager
def collectives_in(context: Context) -> Iterator[None]:
    """Has every collective of the main thread's work, DeepSpeed's too, enter a context while it waits, so that the time is counted."""
    global _context_of_collectives
    before, _context_of_collectives = _context_of_collectives, context
    try:
        yield
    finally:
        _context_of_collectives = before


def waiting() -> contextlib.AbstractContextManager[Any]:
    """The context of a collective; whoever makes one outside of this file enters it."""
    return _context_of_collectives()


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
        with waiting():
            dist.barrier()


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sums a short list of numbers over the ranks, in float64."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    with waiting():
        dist.all_reduce(tensor)
        return tensor.tolist()


def gather_numbers(values: list[float]) -> list[list[float]]:
    """As many numbers of every rank, in rank order, on every rank, in float64."""
    if not dist.is_initialized():
        return [values]
    own = torch.tensor(values, dtype=torch.float64, device=device())
    gathered = own.new_empty(world_size() * len(values))
    with waiting():
        dist.all_gather_into_tensor(gathered, own)
        return gathered.view(world_size(), len(values)).tolist()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds a tensor up over the ranks, in place and without waiting for a GPU."""
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(tensor)
    return tensor


def differs(values: torch.Tensor) -> bool:
    """Whether any rank holds other integers than the rest."""
    if not dist.is_initialized():
        return False
    bounds = torch.stack([values, -values])
    with waiting():
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return bool((bounds[0] != -bounds[1]).any())


def gather_objects(item: T) -> list[T]:
    """`item` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items = [item] * world_size()
    with waiting():
        dist.all_gather_object(items, item)
    return items


def die_with_parent() -> None:
    """Asks the kernel to kill this rank when its launcher dies, so that no orphan goes on writing to the run folder."""
    if launched_world_size() > 1:
        _die_with_parent()


def begin_worker(rank_pid: int, worker: int) -> None:
    """First thing a process does that prepares batches for a rank: it ends with the rank, whose business signals are.

    Args:
        rank_pid: process id of the rank.
        worker: number of the worker, which PyTorch adds.
    """
    _die_with_parent()
    if os.getppid() != rank_pid:
        os._exit(1)  # the rank died before the kernel knew
    # A terminal and a scheduler signal every process; a rank that stops in an orderly way needs its workers to the end of the step.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    if sys.platform == "linux":
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


def join(timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
    """Joins the process group that the launcher started, if it started several processes and none is joined yet.

    Args:
        timeout_seconds: how long a collective waits for a rank before it fails.

    Raises:
        ConfigError: the variables that say where ranks meet are missing, or the port is in use.
        RunAbortedError: the port that torchrun chose is in use by now.
    """
    if launched_world_size() == 1 or dist.is_initialized():
        return
    _check_place()
    if torch.cuda.is_available():
        # NCCL notes its last collectives in a ring of this many entries, which the watchdog writes to a file when a rank hangs.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    timeout = timedelta(seconds=timeout_seconds)
    place: dict[str, Any] = {}
    if _makes_own_store():
        place = {"store": _own_store(timeout), "rank": rank(), "world_size": launched_world_size()}
    dist.init_process_group(backend_name(), timeout=timeout, **place)


def _check_place() -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if not value:
            raise ConfigError(
                f"{name}: not set, but WORLD_SIZE is {launched_world_size()}; set it, unset WORLD_SIZE, or start the ranks by spade-t5 launch"
            )
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise ConfigError(f"{name}: {shown(value)} is not a number; set it, or start the ranks by spade-t5 launch")


def _makes_own_store() -> bool:
    """Whether the first rank makes the store, at the address that all were given; torchrun's agent may have made one for them."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return False
    try:
        ipaddress.ip_address(os.environ["MASTER_ADDR"])
    except ValueError:
        return False  # a host name
    return True


def _own_store(timeout: timedelta) -> dist.TCPStore:
    """The store at which ranks meet, listening at its address only; PyTorch by itself would listen on every network."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank() > 0:
        return dist.TCPStore(address, port, launched_world_size(), is_master=False, timeout=timeout)
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # an address that something in front of this machine has
            return dist.TCPStore(address, port, launched_world_size(), is_master=True, timeout=timeout)
        if (
            "TORCHELASTIC_RUN_ID" in os.environ
        ):  # torchrun chose one that was free, and another program has taken it since
            raise RunAbortedError(
                f"MASTER_PORT: {address}:{port} cannot be opened ({os.strerror(error.errno or 0)}); start again"
            ) from None
        raise ConfigError(
            f"MASTER_PORT: {address}:{port} cannot be opened ({os.strerror(error.errno or 0)}); choose another port, or let spade-t5 launch choose one"
        ) from None
    return dist.TCPStore(
        address, port, launched_world_size(), is_master=True, timeout=timeout, master_listen_fd=listener.detach()
    )


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an error says that another rank is gone or does not answer, rather than that this one did something wrong."""
    while error is not None:
        text = str(error)
        if isinstance(error, dist.DistError) or ("gloo" in text and any(sign in text for sign in _SIGNS_OF_LOST_PEERS)):
            return True
        error = error.__cause__ or error.__context__
    return False


def backend_name() -> str:
    """Collectives of this machine: NCCL beside gloo where there are GPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def shutdown() -> None:
    """Leaves the process group; without it gloo's threads may abort the process at its end."""
    if dist.is_initialized():
        for worker in multiprocessing.active_children():
            worker.kill()  # after a fault a loader that is collected would wait for its workers, five seconds each, twice
        dist.destroy_process_group()
        gc.collect()  # engines hold further groups in reference cycles


def end_process(code: int) -> NoReturn:
    """Ends a process at once, its work being done and its output written.

    At the interpreter's own shutdown, threads of gloo groups that something still refers to abort the process now and then
    ("terminate called without an active exception"), and the launcher takes that for a failure. And it waits for loader processes,
    which may be stuck in storage that does not answer; as they end with their rank, nobody has to.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(code)

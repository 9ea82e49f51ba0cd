"""How fast the ranks talk to each other: the time of collectives by size, and the bandwidth from each host to the next.

The time of a collective is that of one call on the slowest rank, the median over rounds of calls one behind the other. From it follow, as in NVIDIA's
nccl-tests, for n ranks:

    algorithm bandwidth = bytes / seconds                    bytes: the whole tensor, which every rank has before or after the call
    bus bandwidth       = algorithm bandwidth * factor       what each link carries of it in a ring; comparable over n
        factor          = 2 (n - 1) / n                      all_reduce
                          (n - 1) / n                        all_gather, reduce_scatter
                          1                                  broadcast
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]

LATENCY_BYTES = 8
"""Size of a call that takes as long as calls take at least."""
SIZES_BYTES = (LATENCY_BYTES, 64 << 10, 1 << 20, 8 << 20, 64 << 20)
_ITEM_BYTES = 4
_PACKET_BYTES = 1500
"""What fits into one packet of a usual network."""
_ROUNDS = 5
_MAX_CALLS = 200
_FIRST_MESSAGE_BYTES = 256 << 10
_LONG_MESSAGE_SECONDS = 0.05
"""A message that takes so long tells the bandwidth well enough."""
_GROWTH = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectiveTime:
    """One collective at one size."""

    name: CollectiveName
    """What was called."""
    backend: str
    """What ran it: gloo or nccl."""
    num_ranks: int
    """Ranks that took part."""
    num_bytes: int
    """Size of the whole tensor."""
    seconds: float
    """Of one call, on the slowest rank."""

    @property
    def algorithm_bytes_per_second(self) -> float:
        """Bytes of the tensor in a second."""
        return self.num_bytes / self.seconds

    @property
    def bus_bytes_per_second(self) -> float:
        """Bytes that each link of a ring carries in a second."""
        return self.algorithm_bytes_per_second * bus_factor(self.name, self.num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkTime:
    """One message from a rank to another, while all links of the ring carry one."""

    source: int
    """Rank that sent."""
    target: int
    """Rank that received."""
    num_bytes: int
    """Length of the message."""
    seconds: float
    """Until it was there."""

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the link."""
        return self.num_bytes / self.seconds


def bus_factor(name: CollectiveName, num_ranks: int) -> float:
    """Share of the tensor that each link of a ring carries."""
    if name == "broadcast":
        return 1.0
    return (2 if name == "all_reduce" else 1) * (num_ranks - 1) / num_ranks


def measure_collectives(
    names: Sequence[CollectiveName] = ("all_reduce",),
    *,
    device: torch.device,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    seconds_each: float = 0.5,
    group: dist.ProcessGroup | None = None,
) -> list[CollectiveTime]:
    """Times collectives on tensors of `device` (a collective call of all ranks of the group).

    Args:
        names: collectives.
        device: where the tensors lie, which decides who carries them: gloo on a CPU, NCCL on a GPU.
        sizes_bytes: sizes of the whole tensor, ascending, each rounded up to whole numbers for every rank. From the first on at which one call would
            take longer than `seconds_each` they are left out, so that a slow link costs no more time than a fast one.
        seconds_each: about how long one size of one collective is measured.
        group: ranks that take part; None: all.

    Returns:
        the same list on every rank, in the order of `names` and `sizes_bytes`; nothing without a process group of several ranks.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return []
    return [timed for name in names for timed in _measure_sizes(name, device, sizes_bytes, seconds_each, group)]


def measure_ring(
    ranks: Sequence[int], *, device: torch.device, max_bytes: int = 64 << 20, rounds: int = 3
) -> list[LinkTime]:
    """Times a message from each of some ranks to the next one, all at once, so that it takes as long for many hosts as for two (a collective call of all ranks).

    A host whose own connection is slow has two slow links, that from the host before and that to the host behind it.

    Args:
        ranks: one of each host, in order; the last sends to the first.
        device: where the messages lie.
        max_bytes: the longest message; where shorter ones already take long, it stays at those.
        rounds: messages on each link, of which the median counts.

    Returns:
        the same list on every rank, by source in the order of `ranks`; nothing for fewer than two.
    """
    if not dist.is_initialized() or len(ranks) < 2:
        return []
    num_bytes = min(_FIRST_MESSAGE_BYTES, max_bytes)
    _exchange(ranks, num_bytes, device)  # which opens the connections
    while (
        num_bytes < max_bytes
        and _slowest([_exchange(ranks, num_bytes, device)], device, None)[0] < _LONG_MESSAGE_SECONDS
    ):
        num_bytes = min(num_bytes * _GROWTH, max_bytes)
    own = statistics.median(_exchange(ranks, num_bytes, device) for _ in range(rounds))
    # Every rank knows how long its own message took to come; a sum over the others' zeros tells all.
    received = torch.zeros(len(ranks), dtype=torch.float64, device=device)
    if dist.get_rank() in ranks:
        received[ranks.index(dist.get_rank())] = own
    dist.all_reduce(received)
    return [
        LinkTime(source=ranks[i - 1], target=ranks[i], num_bytes=num_bytes, seconds=seconds)
        for i, seconds in sorted(enumerate(received.tolist()), key=lambda item: (item[0] - 1) % len(ranks))
    ]


def _measure_sizes(
    name: CollectiveName,
    device: torch.device,
    sizes_bytes: Sequence[int],
    seconds_each: float,
    group: dist.ProcessGroup | None,
) -> list[CollectiveTime]:
    num_ranks = dist.get_world_size(group)
    results: list[CollectiveTime] = []
    for size in sizes_bytes:
        if results and _expected_seconds(results[-1], size) > seconds_each:
            break
        numel = -(-size // (_ITEM_BYTES * num_ranks)) * num_ranks
        call = _call(name, torch.zeros(numel, device=device), num_ranks, group)
        results.append(
            CollectiveTime(
                name=name,
                backend="nccl" if device.type == "cuda" else "gloo",
                num_ranks=num_ranks,
                num_bytes=numel * _ITEM_BYTES,
                seconds=_seconds_of(call, device, seconds_each, group),
            )
        )
    return results


def _expected_seconds(smaller: CollectiveTime, size_bytes: int) -> float:
    """At most how long a call of this size takes, judged by a smaller one; by one that was all latency nothing can be said."""
    is_all_latency = smaller.num_bytes < _PACKET_BYTES
    return 0.0 if is_all_latency else smaller.seconds * size_bytes / smaller.num_bytes


def _call(name: CollectiveName, whole: Tensor, num_ranks: int, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """What is timed; `whole` is the tensor that every rank has before or after the call."""
    part = whole.new_zeros(whole.numel() // num_ranks)
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if name == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if name == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    return lambda: dist.broadcast(whole, group=group, group_src=0)


def _seconds_of(
    call: Callable[[], object], device: torch.device, seconds_each: float, group: dist.ProcessGroup | None
) -> float:
    with warnings.catch_warnings():
        # torch 2.13 has new names for these collectives, which 2.11 does not know.
        warnings.filterwarnings("ignore", category=FutureWarning)
        _time_calls(call, 1, device, group)  # opens connections
        first = _slowest([_time_calls(call, 1, device, group)], device, group)[0]
        num_calls = min(max(int(seconds_each / _ROUNDS / first), 1), _MAX_CALLS)
        num_rounds = min(max(int(seconds_each / first), 1), _ROUNDS)
        own = [_time_calls(call, num_calls, device, group) for _ in range(num_rounds)]
        return statistics.median(_slowest(own, device, group))


def _time_calls(
    call: Callable[[], object], num_calls: int, device: torch.device, group: dist.ProcessGroup | None
) -> float:
    """Seconds of one of `num_calls` calls, which all ranks begin at once."""
    _meet(device, group)
    begin = time.perf_counter()
    for _ in range(num_calls):
        call()
    _finish(device)
    return (time.perf_counter() - begin) / num_calls


def _exchange(ranks: Sequence[int], num_bytes: int, device: torch.device) -> float:
    """Sends a message to the next rank of the ring; returns after how many seconds the one from the rank before was there, 0 for a rank outside."""
    own = dist.get_rank()
    if own not in ranks:
        _meet(device, None)
        return 0.0
    place = ranks.index(own)
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    operations = [
        dist.P2POp(dist.isend, sent, ranks[(place + 1) % len(ranks)]),
        dist.P2POp(dist.irecv, received, ranks[place - 1]),
    ]
    _meet(device, None)
    begin = time.perf_counter()
    works = dist.batch_isend_irecv(operations)
    works[-1].wait()  # that of the receipt; NCCL has one for both
    _finish(device)
    seconds = time.perf_counter() - begin
    for work in works[:-1]:
        work.wait()
    return seconds


def _slowest(seconds: list[float], device: torch.device, group: dist.ProcessGroup | None) -> list[float]:
    """The largest of each of the numbers over the ranks."""
    tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def _meet(device: torch.device, group: dist.ProcessGroup | None) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _finish(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

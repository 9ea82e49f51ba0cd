"""How fast nodes talk to each other."""

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from spade_t5.training.bandwidth import LATENCY_BYTES, CollectiveTime, measure_collectives, measure_ring

_GPU_BYTES = 64 << 20
_CPU_BYTES = 16 << 20
_MIDDLE_BYTES = 1 << 20


def measure_network(speakers: list[int], device: torch.device) -> tuple[list[CollectiveTime], dict[str, Any]]:
    """Times all-reduces over all ranks and messages between neighbouring nodes, a few seconds in all (a collective call of all ranks).

    Args:
        speakers: one rank of each node.
        device: the CPU, for gloo, or this rank's GPU, for NCCL.

    Returns:
        all-reduces of 8 bytes and of the largest size that takes no longer than half a second; and facts of this rank's node,
        `links_<backend>`: bytes per second from the node before and to the node behind, in the order of the nodes.
    """
    largest = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    times = measure_collectives(device=device, sizes_bytes=(LATENCY_BYTES, _MIDDLE_BYTES, largest))
    links = measure_ring(speakers, device=device, max_bytes=largest)
    own = dist.get_rank() if dist.is_initialized() else 0
    speeds = [link.bytes_per_second for link in links if link.target == own]
    speeds += [link.bytes_per_second for link in links if link.source == own]
    backend = "nccl" if device.type == "cuda" else "gloo"
    return [times[0], times[-1]] if times else [], {f"links_{backend}": speeds} if speeds else {}


def as_json(timed: CollectiveTime) -> dict[str, Any]:
    """JSON values of a measurement, with its bandwidths."""
    return {
        **asdict(timed),
        "algorithm_bytes_per_second": timed.algorithm_bytes_per_second,
        "bus_bytes_per_second": timed.bus_bytes_per_second,
    }

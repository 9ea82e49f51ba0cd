"""Collectives and messages between real ranks; delays that the tests make are found in the figures."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spade_t5.testing import call_on_ranks
from spade_t5.training import distributed
from spade_t5.training.bandwidth import CollectiveTime, bus_factor, measure_collectives, measure_ring

CPU = torch.device("cpu")
NAMES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def collectives_of_a_rank() -> list[dict[str, Any]]:
    distributed.join(60)
    times = measure_collectives(NAMES, device=CPU, sizes_bytes=(8, 100_000), seconds_each=0.02)
    distributed.shutdown()
    return [dataclasses.asdict(each) for each in times]


def collectives_with_a_slow_rank(seconds: float) -> list[dict[str, Any]]:
    distributed.join(60)
    all_reduce = dist.all_reduce

    def slow(tensor: torch.Tensor, *arguments: Any, **words: Any) -> Any:
        if tensor.dtype == torch.float32 and tensor.numel() > 1:
            time.sleep(seconds * distributed.rank())
        return all_reduce(tensor, *arguments, **words)

    dist.all_reduce = slow
    times = measure_collectives(device=CPU, sizes_bytes=(8, 2000, 4000, 8000), seconds_each=2 * seconds)
    dist.all_reduce = all_reduce
    distributed.shutdown()
    return [dataclasses.asdict(each) for each in times]


def ring_with_a_slow_rank(slow: int, seconds: float) -> list[dict[str, Any]]:
    distributed.join(60)
    send_and_receive = dist.batch_isend_irecv

    def late(operations: list[dist.P2POp]) -> list[Any]:
        if distributed.rank() == slow:
            time.sleep(seconds)
        return send_and_receive(operations)

    dist.batch_isend_irecv = late
    links = measure_ring((0, 1, 3), device=CPU, max_bytes=1 << 20, rounds=1)
    distributed.shutdown()
    return [dataclasses.asdict(each) for each in links]


def test_every_rank_gets_the_same_times(tmp_path: Path) -> None:
    first, second = call_on_ranks(collectives_of_a_rank, num_ranks=2, log_dir=tmp_path)
    assert first == second
    assert [(each["name"], each["num_bytes"]) for each in first] == [(n, b) for n in NAMES for b in (8, 100_000)]
    assert all(each["seconds"] > 0 and each["backend"] == "gloo" and each["num_ranks"] == 2 for each in first)


def test_a_slow_rank_counts_and_long_calls_are_left_out(tmp_path: Path) -> None:
    delay = 0.05
    times = call_on_ranks(collectives_with_a_slow_rank, {"seconds": delay}, num_ranks=2, log_dir=tmp_path)
    assert times[0] == times[1]
    # 8000 bytes are expected to take four times as long as 2000, which is more than allowed.
    assert [each["num_bytes"] for each in times[0]] == [8, 2000]
    assert all(each["seconds"] >= delay for each in times[0])


def test_a_ring_names_the_slow_sender_and_passes_over_others(tmp_path: Path) -> None:
    links = call_on_ranks(ring_with_a_slow_rank, {"slow": 1, "seconds": 0.2}, num_ranks=4, log_dir=tmp_path)
    assert all(each == links[0] for each in links)
    assert [(link["source"], link["target"]) for link in links[0]] == [(0, 1), (1, 3), (3, 0)]
    # The slow rank is late to send, and late to take what was sent to it.
    assert [link["seconds"] >= 0.2 for link in links[0]] == [True, True, False]


def test_bandwidths() -> None:
    time_of_one = CollectiveTime(name="all_reduce", backend="gloo", num_ranks=4, num_bytes=8_000, seconds=0.002)
    assert time_of_one.algorithm_bytes_per_second == pytest.approx(4e6)
    assert time_of_one.bus_bytes_per_second == pytest.approx(6e6)
    assert bus_factor("all_gather", 4) == bus_factor("reduce_scatter", 4) == 0.75
    assert bus_factor("broadcast", 4) == 1


def test_one_process_measures_nothing() -> None:
    assert measure_collectives(device=CPU) == []
    assert measure_ring((0,), device=CPU) == []

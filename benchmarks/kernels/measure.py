"""Times and peak memory of workloads, on a GPU by events, on a CPU by interleaved rounds."""

import gc
import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from spade_t5.benchmarks.kernels.cases import Workload
from spade_t5.benchmarks.resident_memory import reset_peak, resident_bytes

PARTS = ("forward", "backward", "both")

# Larger than the second-level cache of any GPU, so that no part finds its inputs there.
_FLUSH_BYTES = 256 << 20
# About two milliseconds in which the GPU waits: all launches of a part are then queued before it starts, and the times
# are the GPU's and not those of Python.
_HEAD_START_CYCLES, _HEAD_START_SECONDS = 4_000_000, 2e-3
_WARM_ROUNDS = 3
_MAX_ROUNDS = 100

Times = dict[str, list[float]]
"""Seconds of each part, one entry a round."""


def summary(times: Times) -> dict[str, dict[str, float]]:
    """Median and the 20th and 80th percentile of each part that was timed."""
    found = {}
    for part, seconds in times.items():
        if seconds:
            p20, median, p80 = np.percentile(seconds, (20, 50, 80))
            found[part] = {"median_seconds": float(median), "p20_seconds": float(p20), "p80_seconds": float(p80)}
    return found


def time_on_gpu(workload: Workload, *, seconds: float) -> Times:
    """Rounds of forward and backward for about `seconds`, after a few that warm up and compile."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=workload.gradients[0].device)
    for _ in range(_WARM_ROUNDS - 1):
        workload.backward(workload.outputs())
    torch.cuda.synchronize()
    started = time.perf_counter()
    workload.backward(workload.outputs())
    torch.cuda.synchronize()
    rounds = int(seconds / (time.perf_counter() - started + 2 * _HEAD_START_SECONDS))
    rounds = min(max(rounds, 5), _MAX_ROUNDS)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(rounds)]
    for before_forward, after_forward, before_backward, after_backward in events:
        flush.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        before_forward.record()
        outputs = workload.outputs()
        after_forward.record()
        flush.zero_()
        torch.cuda._sleep(_HEAD_START_CYCLES)
        before_backward.record()
        workload.backward(outputs)
        after_backward.record()
    torch.cuda.synchronize()
    forward = [1e-3 * first.elapsed_time(second) for first, second, _, _ in events]
    backward = [1e-3 * third.elapsed_time(fourth) for _, _, third, fourth in events]
    return _with_both(forward, backward if workload.leaves else [])


def peak_bytes_on_gpu(workload: Workload) -> int:
    """Most memory allocated during forward and backward, beyond the inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workload.backward(workload.outputs())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_on_cpu(workloads: Mapping[str, Workload], *, rounds: int) -> dict[str, Times]:
    """Rounds in which the workloads take turns, so that what disturbs the machine disturbs them alike."""
    forward: dict[str, list[float]] = {name: [] for name in workloads}
    backward: dict[str, list[float]] = {name: [] for name in workloads}
    for _ in range(rounds):
        for name, workload in workloads.items():
            gc.collect()
            start = time.perf_counter()
            outputs = workload.outputs()
            middle = time.perf_counter()
            workload.backward(outputs)
            end = time.perf_counter()
            del outputs
            forward[name].append(middle - start)
            if workload.leaves:
                backward[name].append(end - middle)
    return {name: _with_both(forward[name], backward[name]) for name in workloads}


def peak_bytes_on_cpu(build: Any, warm_up: Any, *arguments: Any) -> int:
    """Growth of the resident set during forward and backward, in a fresh process.

    Args:
        build: function that makes the workload; it and its arguments are pickled.
        warm_up: function of the same arguments that is called first and loads what loads at first use.
        *arguments: of both.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once: every process after that starts with the modules loaded and nothing run.
    context.set_forkserver_preload(["spade_t5.benchmarks.kernels.registry"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, build, warm_up, torch.get_num_threads(), arguments))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError("the process that measures memory ended early; its own messages say why") from None
    finally:
        process.join()


def _send_peak(sender: Connection, build: Any, warm_up: Any, threads: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    warm_up(*arguments)
    workload: Workload = build(*arguments)
    gc.collect()
    reset_peak()
    before = resident_bytes()
    workload.backward(workload.outputs())
    sender.send(resident_bytes(peak=True) - before)


def _with_both(forward: list[float], backward: list[float]) -> Times:
    if not backward:
        return {"forward": forward}
    return {
        "forward": forward,
        "backward": backward,
        "both": [first + second for first, second in zip(forward, backward, strict=True)],
    }

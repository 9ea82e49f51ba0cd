"""What the machine can do at best, measured in the same run: bytes copied and matrix products, a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from spade_t5.benchmarks.kernels.cases import Plan, Work
from spade_t5.kernels.linear import linear


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Copy bandwidth (bytes read plus bytes written) and matrix product in the plan's dtype."""

    bytes_per_second: float
    flops_per_second: float

    def least_seconds(self, work: Work, part: str) -> float:
        """Time of the work if it ran at one of the two ceilings: the roofline."""
        flops, size_bytes = work.of(part)
        return max(flops / self.flops_per_second, size_bytes / self.bytes_per_second)


def measure_ceilings(plan: Plan) -> Ceilings:
    """Medians over copies and products of a size that hides their start."""
    is_gpu = plan.device == "cuda"
    elements = 1 << (20 if plan.is_quick else 29 if is_gpu else 26)
    side = 256 if plan.is_quick else 8192 if is_gpu else 2048
    source = torch.ones(elements, dtype=plan.dtype, device=plan.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=plan.device).to(plan.dtype) for _ in range(2))
    # float32 on a CPU has two libraries for products; the faster one is the ceiling.
    products = [lambda: torch.matmul(a, b), lambda: linear(a, b)]
    copy_seconds = _typical_seconds(lambda: target.copy_(source), is_gpu)
    return Ceilings(
        bytes_per_second=2 * source.nbytes / copy_seconds,
        flops_per_second=2 * side**3 / min(_typical_seconds(product, is_gpu) for product in products),
    )


def _typical_seconds(run: Callable[[], object], is_gpu: bool, rounds: int = 9) -> float:
    seconds = []
    repeats = 10 if is_gpu else 1  # waiting for a GPU takes a few hundredths of these times
    for number in range(rounds + 2):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if is_gpu:
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append((time.perf_counter() - start) / repeats)
    return statistics.median(seconds)

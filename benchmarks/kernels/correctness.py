"""No time is taken of a wrong result: every op is compared with its reference in float64 before anything is measured."""

from typing import Any

import torch
from torch import Tensor

from spade_t5.benchmarks.kernels.cases import Benchmark, Plan, Workload

_RELATIVE_BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative error, in norm, by the dtype of the inputs: the bounds of the tests."""

_PEER_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""From this difference on, a peer computes something else; peers may round more often than we do."""


class RedCheckError(RuntimeError):
    """An op differs from its reference; the message says which and by how much."""


def run_checks(plan: Plan, ops: dict[str, Benchmark]) -> list[dict[str, Any]]:
    """Compare outputs and gradients of every op with the reference.

    Returns:
        name and largest relative error of each check.

    Raises:
        RedCheckError: a check failed, or the op failed.
    """
    found = []
    for op, benchmark in ops.items():
        for check in benchmark.checks(plan):
            name = f"{op}, {check.name}"
            try:
                error = _largest_error(check.ours(), check.exact())
            except Exception as problem:
                raise RedCheckError(f"{name}: {type(problem).__name__}: {problem}") from problem
            bound = _RELATIVE_BOUNDS[plan.dtype]
            if not error <= bound:  # NaN is larger than any bound
                raise RedCheckError(
                    f"{name}: relative error {error:.1e} against the reference in float64, bound {bound:.0e}"
                )
            found.append({"op": op, "check": check.name, "relative_error": error, "bound": bound})
    return found


def why_incomparable(plan: Plan, outputs: tuple[Tensor, ...], ours: tuple[Tensor, ...]) -> str | None:
    """What is wrong with a peer's outputs, None if they are ours to the precision of the dtype."""
    shapes, expected = ([tuple(x.shape) for x in tensors] for tensors in (outputs, ours))
    if shapes != expected:
        return f"computes something else: shapes {shapes} instead of {expected}"
    difference = max(relative_error(x, y) for x, y in zip(outputs, ours, strict=True))
    if not difference <= _PEER_BOUNDS[plan.dtype]:
        return f"computes something else: outputs differ from ours by {difference:.1e}, relative to their norm"
    return None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`; an `expected` of zero leaves the norm itself."""
    size = expected.detach().double().norm().item()
    error = (actual.detach().double() - expected.detach().double()).norm().item()
    return error / size if size else error


def _largest_error(ours: Workload, exact: Workload) -> float:
    tensors = []
    for workload in (ours, exact):
        outputs = workload.outputs()
        tensors.append((*outputs, *workload.backward(outputs)))
    return max(relative_error(actual, expected) for actual, expected in zip(*tensors, strict=True))

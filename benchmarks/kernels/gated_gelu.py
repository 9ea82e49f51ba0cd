"""Gated GELU on the two halves of one projection."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spade_t5.benchmarks.kernels.cases import (
    OURS,
    Benchmark,
    Case,
    Check,
    Plan,
    Work,
    Workload,
    doubled,
    leaf,
    random_tensors,
)
from spade_t5.kernels.gated_gelu import gated_gelu, gated_gelu_naive


def cases(plan: Plan) -> Iterator[Case]:
    """All tokens of the plan; the length of a row does not matter."""
    contenders: dict[str, Callable[[], Workload]] = {
        OURS: partial(_workload, plan, plan.tokens, gated_gelu),
        "eager": partial(_workload, plan, plan.tokens, gated_gelu_naive),
    }
    if plan.device == "cuda":
        contenders["inductor"] = lambda: _workload(plan, plan.tokens, torch.compile(gated_gelu_naive, dynamic=False))
        contenders["liger"] = partial(_liger, plan)
    tensor = plan.tokens * plan.d_ff * plan.dtype.itemsize
    yield Case(
        name=f"{plan.d_ff} columns",
        group="gated gelu",
        length=plan.tokens,
        work=Work(forward_bytes=3 * tensor, backward_bytes=5 * tensor),
        contenders=contenders,
        compiled=("inductor",),
        shape={"rows": plan.tokens, "d_ff": plan.d_ff},
    )


def checks(plan: Plan) -> Iterator[Check]:
    """A few rows."""
    yield Check(
        name="two halves",
        ours=partial(_workload, plan, 37, gated_gelu),
        exact=partial(_exact, plan, 37),
    )


def _inputs(plan: Plan, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x, dh = random_tensors(plan, (rows, 2 * plan.d_ff), (rows, plan.d_ff))
    a, b = x.chunk(2, dim=-1)
    return leaf(a), leaf(b), dh


def _workload(plan: Plan, rows: int, run: Callable[[Tensor, Tensor], Tensor]) -> Workload:
    a, b, dh = _inputs(plan, rows)
    return Workload(forward=lambda: run(a, b), leaves=(a, b), gradients=(dh,))


def _exact(plan: Plan, rows: int) -> Workload:
    a, b, dh = _inputs(plan, rows)
    leaves = doubled(a, b)
    return Workload(forward=lambda: gated_gelu_naive(*leaves), leaves=leaves, gradients=(dh.double(),))


def _liger(plan: Plan) -> Workload:
    """Liger takes two adjacent tensors and writes their gradients over them, which changes the values but not the time."""
    from liger_kernel.transformers.functional import liger_geglu

    a, b, dh = _inputs(plan, plan.tokens)
    a, b = leaf(a.contiguous()), leaf(b.contiguous())
    return Workload(forward=lambda: liger_geglu(a, b), leaves=(a, b), gradients=(dh,))


BENCHMARK = Benchmark(checks=checks, cases=cases)

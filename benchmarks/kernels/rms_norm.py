"""T5's norm: alone, after a residual sum, and with dropout on the branch that is added."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

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
    plan_for,
    random_tensors,
)
from spade_t5.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_naive,
    rms_norm,
    rms_norm_naive,
    rms_norm_with_transpose,
)

_EPS = 1e-6
_DROPOUT = 0.1

_Norm = Callable[..., Any]


def cases(plan: Plan) -> Iterator[Case]:
    """All tokens of the plan; the length of a row does not matter."""
    tensor = plan.tokens * plan.d_model * plan.dtype.itemsize
    with_residual = Work(forward_bytes=4 * tensor, backward_bytes=5 * tensor)
    yield _case(plan, "residual", add_rms_norm, add_rms_norm_naive, _liger_add_norm, with_residual)
    yield _case(
        plan,
        "residual and dropout",
        partial(add_rms_norm, dropout_p=_DROPOUT),
        partial(add_rms_norm_naive, dropout_p=_DROPOUT),
        None,
        with_residual,
    )
    alone = Work(forward_bytes=2 * tensor, backward_bytes=3 * tensor)
    yield _case(plan, "alone", rms_norm, rms_norm_naive, _liger_norm, alone)


def checks(plan: Plan) -> Iterator[Check]:
    """A few rows, with and without the residual."""
    for name, norm, naive in (
        ("residual", add_rms_norm, add_rms_norm_naive),
        ("alone", rms_norm, rms_norm_naive),
    ):
        yield Check(
            name=name,
            ours=partial(_workload, plan, 37, norm, has_residual=name == "residual"),
            exact=partial(_workload, plan, 37, naive, has_residual=name == "residual", is_double=True),
        )


def tuning_workloads() -> dict[str, Callable[[], Workload]]:
    """Every width that the launch table knows, with and without the transposed copy of the norm."""
    plan = plan_for("cuda", is_quick=False)
    found: dict[str, Callable[[], Workload]] = {}
    for d_model in (1024, 512, 2048, 256, 4096, 128, 8192):
        wide = replace(plan, d_model=d_model)
        rows = plan.tokens * plan.d_model // d_model
        found[f"{d_model} columns"] = partial(_workload, wide, rows, add_rms_norm, has_residual=True)
        found[f"{d_model} columns, transposed"] = partial(
            _workload, wide, rows, _transposed_norm, has_residual=False, batch=8
        )
    return found


def _transposed_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm_with_transpose(x, weight, eps)


def _case(plan: Plan, name: str, norm: _Norm, naive: _Norm, liger: Callable[[], _Norm] | None, work: Work) -> Case:
    build = partial(_workload, plan, plan.tokens, has_residual=name != "alone")
    contenders: dict[str, Callable[[], Workload]] = {OURS: partial(build, norm), "eager": partial(build, naive)}
    if plan.device == "cuda":
        contenders["inductor"] = lambda: build(torch.compile(naive, dynamic=False))
        if liger is not None:
            contenders["liger"] = lambda: build(liger())
    has_dropout = "dropout" in name
    return Case(
        name=f"{name}, {plan.d_model} columns",
        group=name,
        length=plan.tokens,
        work=work,
        contenders=contenders,
        compiled=("inductor",),
        shape={"rows": plan.tokens, "d_model": plan.d_model, "dropout_p": _DROPOUT if has_dropout else 0.0},
        incomparable=tuple(contenders) if has_dropout else (),
    )


def _workload(
    plan: Plan, rows: int, norm: _Norm, *, has_residual: bool, is_double: bool = False, batch: int | None = None
) -> Workload:
    size = (rows, plan.d_model) if batch is None else (batch, rows // batch, plan.d_model)
    tensors = random_tensors(plan, size, size, size, size)
    (weight,) = random_tensors(plan, (plan.d_model,), seed=1)
    inputs = (*tensors[:2], weight) if has_residual else (tensors[0], weight)
    gradients = tensors[2:] if has_residual or batch is not None else tensors[2:3]
    leaves = doubled(*inputs) if is_double else tuple(leaf(x) for x in inputs)
    if is_double:
        gradients = tuple(x.double() for x in gradients)
    return Workload(forward=lambda: norm(*leaves, _EPS), leaves=leaves, gradients=gradients)


def _liger_norm() -> _Norm:
    from liger_kernel.transformers.functional import liger_rms_norm

    # In place it would overwrite the gradient that comes in.
    return lambda x, weight, eps: liger_rms_norm(x, weight, eps, in_place=False)


def _liger_add_norm() -> _Norm:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, r = liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)
        return r, y

    return norm


BENCHMARK = Benchmark(checks=checks, cases=cases, tuning=tuning_workloads)

"""Cross-entropy over the vocabulary from the hidden states, with z-loss, summed over the targets.

Ours computes the gradients in the forward pass, so that only the sum of both passes compares.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
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
from spade_t5.kernels.linear_cross_entropy import linear_cross_entropy

_Z_LOSS = 1e-4

_Loss = Callable[..., Tensor]


def cases(plan: Plan) -> Iterator[Case]:
    """The targets of one batch."""
    build = partial(_workload, plan, plan.targets)
    contenders: dict[str, Callable[[], Workload]] = {
        OURS: partial(build, partial(linear_cross_entropy, z_loss=_Z_LOSS)),
        "logits": partial(build, _with_logits),
    }
    if plan.device == "cuda":
        contenders["inductor"] = lambda: build(torch.compile(_with_logits, dynamic=False))
        contenders["liger"] = lambda: build(_liger())
    product = 2.0 * plan.targets * plan.d_model * plan.vocab_size
    matrices = plan.dtype.itemsize * plan.d_model * (plan.targets + plan.vocab_size)
    yield Case(
        name=f"{plan.targets} targets",
        group="cross-entropy",
        length=plan.targets,
        work=Work(
            forward_flops=product, backward_flops=2 * product, forward_bytes=matrices, backward_bytes=2 * matrices
        ),
        contenders=contenders,
        compiled=("inductor",),
        shape={"targets": plan.targets, "d_model": plan.d_model, "vocab_size": plan.vocab_size},
    )


def checks(plan: Plan) -> Iterator[Check]:
    """A few targets."""
    loss = partial(linear_cross_entropy, z_loss=_Z_LOSS)
    yield Check(
        name="z-loss",
        ours=partial(_workload, plan, 37, loss),
        exact=partial(_workload, plan, 37, partial(loss, backend="naive"), is_double=True),
    )


def _workload(plan: Plan, targets: int, loss: _Loss, *, is_double: bool = False) -> Workload:
    x, weight = random_tensors(plan, (targets, plan.d_model), (plan.vocab_size, plan.d_model))
    weight = weight * plan.d_model**-0.5
    generator = torch.Generator(plan.device).manual_seed(1)
    labels = torch.randint(plan.vocab_size, (targets,), generator=generator, device=plan.device)
    leaves = doubled(x, weight) if is_double else (leaf(x), leaf(weight))
    dtype = torch.float64 if is_double else torch.float32
    return Workload(
        forward=lambda: loss(*leaves, labels),
        leaves=leaves,
        gradients=(torch.ones((), dtype=dtype, device=plan.device),),
    )


def _with_logits(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The usual way: a linear map, all logits in float32, cross-entropy."""
    logits = F.linear(x, weight).float()
    z_loss = _Z_LOSS * torch.logsumexp(logits, dim=-1).square().sum()
    return F.cross_entropy(logits, labels, reduction="sum") + z_loss


def _liger() -> _Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        result = liger_fused_linear_cross_entropy(x, weight, labels, reduction="sum", lse_square_scale=_Z_LOSS)
        return result[0] if isinstance(result, tuple) else result

    return loss


BENCHMARK = Benchmark(checks=checks, cases=cases)

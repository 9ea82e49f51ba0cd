"""What is measured: plans (sizes for a device), cases (one shape of one op) and workloads (one implementation on a case)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a whole run.

    Every length is measured with as many rows as make `tokens`, so that the times of different lengths compare.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    lengths: tuple[int, ...]
    """Tokens a row, the most important first: a run that is cut short has measured these."""
    document_tokens: int
    """Length of the documents in packed rows."""
    radius: int
    """Keys that local attention sees on either side."""
    full_length: int
    """Tokens a row in full and causal attention."""
    num_heads: int
    d_kv: int
    d_model: int
    d_ff: int
    d_state: int
    vocab_size: int
    targets: int
    """Target tokens of the cross-entropy."""
    ssm_channels: int
    """Channels whose convolution kernels are generated."""
    check_length: int = 150
    """Tokens a row in the checks that come before all timing."""
    is_quick: bool = False
    """Tiny sizes, which show that everything runs and say nothing about speed."""


def plan_for(device: str, *, is_quick: bool) -> Plan:
    """The sizes for a device, full or quick."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if is_quick:
        return Plan(
            device=device,
            dtype=dtype,
            tokens=256,
            lengths=(128, 64),
            document_tokens=16,
            radius=15,
            full_length=64,
            num_heads=2,
            d_kv=16,
            d_model=64,
            d_ff=96,
            d_state=16,
            vocab_size=500,
            targets=24,
            ssm_channels=8,
            check_length=40,
            is_quick=True,
        )
    if device == "cuda":
        return Plan(
            device=device,
            dtype=dtype,
            tokens=65536,
            lengths=(4096, 512, 16384, 65536),
            document_tokens=256,
            radius=127,
            full_length=512,
            num_heads=12,
            d_kv=64,
            d_model=768,
            d_ff=2048,
            d_state=64,
            vocab_size=32128,
            targets=14336,
            ssm_channels=768,
        )
    return Plan(
        device=device,
        dtype=dtype,
        tokens=4096,
        lengths=(4096, 512, 1024, 2048),
        document_tokens=256,
        radius=127,
        full_length=512,
        num_heads=8,
        d_kv=64,
        d_model=512,
        d_ff=1024,
        d_state=64,
        vocab_size=32128,
        targets=910,
        ssm_channels=512,
    )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One implementation with its inputs made: what is timed is `forward`, then the gradients of `leaves`."""

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    """Tensors whose gradients the backward pass computes; none: there is no backward pass."""
    gradients: tuple[Tensor, ...]
    """Gradients that come in, one an output."""

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward."""
        result = self.forward()
        return result if isinstance(result, tuple) else (result,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the leaves; nothing is accumulated into them."""
        return torch.autograd.grad(outputs, self.leaves, self.gradients) if self.leaves else ()


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that an implementation has to do: products of visible pairs, inputs read and outputs written once."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0

    def of(self, part: str) -> tuple[float, float]:
        """Operations and bytes of "forward", "backward" or "both"."""
        forward, backward = (self.forward_flops, self.forward_bytes), (self.backward_flops, self.backward_bytes)
        if part == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if part == "forward" else backward


OURS = "ours"
"""The contender that is what the model runs on the device of the plan."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one op, with everything that can compute it."""

    name: str
    group: str
    """Cases of one group differ in `length` alone and share a plot."""
    length: int
    work: Work
    contenders: dict[str, Callable[[], Workload]]
    """Name to builder; "ours" first."""
    shape: dict[str, Any]
    compiled: tuple[str, ...] = ()
    """Contenders that spend many seconds in torch.compile: measured on a GPU after all others of the run."""
    incomparable: tuple[str, ...] = ()
    """Contenders whose outputs differ from ours by design (dropout draws other masks)."""
    max_rounds: int | None = None
    """Bound on the rounds on a CPU, for what takes many seconds."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Our implementation and the reference in float64 on the same rounded inputs."""

    name: str
    ours: Callable[[], Workload]
    exact: Callable[[], Workload]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One op: its checks, its cases, and what its launch configurations are tuned on."""

    checks: Callable[[Plan], Iterator[Check]]
    cases: Callable[[Plan], Iterator[Case]]
    tuning: Callable[[], dict[str, Callable[[], Workload]]] = field(default=dict)
    """Workloads on a CUDA device that together launch every kernel variant of the op's table; the ones of cases, if empty."""


def document_ids(rows: int, length: int, document_tokens: int, device: str) -> Tensor:
    """Segment ids of rows that are full of documents of one length: int64 (rows, length)."""
    return (torch.arange(length, device=device) // document_tokens + 1).repeat(rows, 1)


def random_tensors(
    plan: Plan, *shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Normal tensors in the plan's dtype on its device, the same numbers in every process."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    return tuple(
        (scale * torch.randn(shape, generator=generator, device=plan.device)).to(dtype or plan.dtype)
        for shape in shapes
    )


def leaf(x: Tensor) -> Tensor:
    """The same values as a leaf that takes a gradient."""
    return x.detach().requires_grad_()


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leaves of the same values in float64."""
    return tuple(leaf(x.double()) for x in tensors)

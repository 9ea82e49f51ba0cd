"""How much a step did and how fast: tokens, floating-point operations, and the share of the device's peak that they are.

    MFU = model FLOPs / (seconds x devices x peak)         HFU = executed FLOPs / (seconds x devices x peak)

Model FLOPs are what the mathematics of the real tokens needs (PaLM, arXiv:2204.02311, appendix B); executed FLOPs are what the
operations that were chosen multiply in fact: padding, blocks that a mask empties, and what is computed again in the backward pass. Who
counts them knows the model; the engine only adds them up.
"""

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from spade_t5.training.data import Batch

_STATM = "/proc/self/statm"


class BatchFlops(Protocol):
    """Operations of the forward and backward pass of a batch, two for a multiplication with its addition."""

    @property
    def model(self) -> float:
        """What the mathematics needs."""
        ...

    @property
    def executed(self) -> float:
        """What is computed."""
        ...


CountFlops = Callable[[Batch], BatchFlops]


class Work(NamedTuple):
    """What a step does, on one rank or, added up, on all."""

    targets: float
    """Terms of the loss."""
    tokens: float
    """Input tokens, without padding."""
    input_positions: float
    """Input tokens with padding."""
    target_positions: float
    """Targets with padding."""
    model_flops: float
    """0 where nobody counts them."""
    executed_flops: float
    """0 where nobody counts them."""


def work_of(batches: Iterable[Batch], num_targets: Callable[[Batch], int], count_flops: CountFlops | None) -> Work:
    """The work of one rank's micro-batches.

    Args:
        batches: on the CPU.
        num_targets: terms of the loss of a batch.
        count_flops: operations of a batch; None: nobody counts them.
    """
    parts = []
    for batch in batches:
        flops = None if count_flops is None else count_flops(batch)
        parts.append(
            Work(
                targets=num_targets(batch),
                tokens=_num_input_tokens(batch),
                input_positions=batch["input_ids"].numel(),
                target_positions=batch["labels"].numel(),
                model_flops=0.0 if flops is None else float(flops.model),
                executed_flops=0.0 if flops is None else float(flops.executed),
            )
        )
    return Work(*(sum(values) for values in zip(*parts, strict=True)))


def rates(work: Work, seconds: float, num_devices: int, peak_flops: float | None) -> dict[str, float | None]:
    """The rates of a step, as fields of metrics.jsonl.

    Args:
        work: of all ranks.
        seconds: that the step took.
        num_devices: number of ranks.
        peak_flops: what one device can do in a second; None: unknown.
    """
    model, executed = (
        flops / seconds / num_devices if flops else None for flops in (work.model_flops, work.executed_flops)
    )
    return {
        "tokens_per_second": work.tokens / seconds,
        "targets_per_second": work.targets / seconds,
        "padded_tokens_per_second": work.input_positions / seconds,
        "padded_targets_per_second": work.target_positions / seconds,
        "model_flops_per_second": model,
        "executed_flops_per_second": executed,
        "mfu": None if model is None or peak_flops is None else model / peak_flops,
        "hfu": None if executed is None or peak_flops is None else executed / peak_flops,
    }


class MemoryMeter:
    """What a rank holds in memory: of a GPU the most since the last reading, of a CPU what is resident now."""

    def __init__(self, device: torch.device) -> None:
        """Reads the memory of `device`."""
        self._device = device

    def read(self) -> dict[str, int]:
        """Bytes by kind; the first is the one to compare with what the device has."""
        if self._device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self._device)
            allocated = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return {"reserved_bytes": reserved, "allocated_bytes": allocated}
        try:
            with open(_STATM, encoding="ascii") as file:
                return {"resident_bytes": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
        except OSError:
            return {}  # a system that does not say


def _num_input_tokens(batch: Batch) -> int:
    for name in ("segment_ids", "attention_mask"):
        if name in batch:
            return int((batch[name] != 0).sum())
    return batch["input_ids"].numel()

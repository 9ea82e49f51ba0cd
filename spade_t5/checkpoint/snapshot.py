"""The state of one rank at the end of a step, copied to host memory: the only part of a save that training waits for.

A rank copies only what it owns; no collective is made. Copies from a GPU go to pinned memory, all of them in flight at once; torch keeps
pinned blocks for the next snapshot.
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spade_t5.checkpoint.state import AVERAGE, FROZEN_FILE, HELD_OUT_LOSS, WEIGHT, rank_file
from spade_t5.checkpoint.tensor_file import HostTensor
from spade_t5.training import distributed
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import Backend

PINNED_BLOCK_BYTES = 64 << 20
"""A power of two, to which torch's allocator of pinned memory rounds up."""

Index = dict[str, dict[str, list[tuple[str, int, int]]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What this rank writes of a checkpoint."""

    step: int
    """Number of finished steps."""
    facts: dict[str, Any]
    """Further JSON values for `state.json`."""
    files: dict[str, dict[str, HostTensor]]
    """File name -> tensor name -> tensor."""
    index: Index
    """State -> parameter -> pieces [file, offset, numel]."""
    whole: dict[str, dict[str, str]]
    """State -> parameter -> file, for optimizer states of another shape than the parameter."""
    scalars: dict[str, dict[str, float]]
    """State -> parameter -> number."""
    shapes: dict[str, list[int]]
    """Of all parameters."""
    seconds: float
    """For which training waited."""

    @property
    def num_bytes(self) -> int:
        """Size of this rank's tensors."""
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors.values())


def take_snapshot(
    backend: Backend, *, step: int, facts: dict[str, Any], average: WeightAverage | None = None
) -> Snapshot:
    """Copies this rank's weights, optimizer state and averages to host memory; to be called between steps.

    Numbers that are not finite are noticed when the snapshot is written.

    Args:
        backend: owner of the weights and of the optimizer.
        step: number of finished steps.
        facts: further JSON values for `state.json`; `held_out_loss` says how good the checkpoint is.
        average: moving average of the weights, where there is one.
    """
    started = time.perf_counter()
    copies = _HostCopies()
    files: dict[str, dict[str, HostTensor]] = {}
    index: Index = {}
    whole: dict[str, dict[str, str]] = {}
    scalars: dict[str, dict[str, float]] = {}
    file = rank_file(distributed.rank())
    for fragment in backend.fragments() if backend.is_sharded or distributed.is_main() else []:
        states = {WEIGHT: fragment.flat, **backend.optimizer.state.get(fragment.flat, {})}
        if average is not None:
            states[AVERAGE] = average.flat(fragment)
        for key, value in states.items():
            if value.dim() == 0:
                scalars.setdefault(key, {})[fragment.name] = float(value)
                continue
            if value.shape == fragment.flat.shape:
                value = value.detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]
                index.setdefault(key, {})[fragment.name] = [(file, fragment.offset, fragment.numel)]
            else:
                whole.setdefault(key, {})[fragment.name] = file
            files.setdefault(file, {})[f"{key}/{fragment.name}"] = copies.add(value.detach())
    if distributed.is_main():
        files[FROZEN_FILE] = {name: copies.add(tensor) for name, tensor in backend.frozen_state().items()}
    copies.wait()
    return Snapshot(
        step=step,
        facts=_fixed(facts),
        files=files,
        index=index,
        whole=whole,
        scalars=scalars,
        shapes={name: list(getattr(p, "ds_shape", p.shape)) for name, p in backend.module.named_parameters()},
        seconds=time.perf_counter() - started,
    )


def _fixed(facts: dict[str, Any]) -> dict[str, Any]:
    """A copy that later steps do not change; a held-out loss that is not finite says nothing about how good the weights are."""
    loss = facts.get(HELD_OUT_LOSS)
    is_useless = isinstance(loss, float) and not math.isfinite(loss)
    return copy.deepcopy({name: value for name, value in facts.items() if name != HELD_OUT_LOSS or not is_useless})


class _HostCopies:
    """Copies tensors to host memory; those from a GPU are there after `wait`."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._is_waiting = False

    def add(self, source: Tensor) -> HostTensor:
        """A copy of a tensor, in several parts where it does not fit into a pinned block."""
        flat = source.detach().reshape(-1)
        parts = [flat.clone()] if source.device.type == "cpu" else self._pinned(flat)
        return HostTensor(source.dtype, tuple(source.shape), parts)

    def wait(self) -> None:
        """Waits for the copies in flight."""
        if self._is_waiting:
            torch.cuda.synchronize()

    def _pinned(self, flat: Tensor) -> list[Tensor]:
        self._is_waiting = True
        parts = []
        start = 0
        while start < flat.numel():
            room = (self._block.numel() - self._used) // flat.itemsize
            if room == 0:
                self._block = torch.empty(PINNED_BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
                self._used = 0
                continue
            numel = min(room, flat.numel() - start)
            num_bytes = numel * flat.itemsize
            part = self._block[self._used : self._used + num_bytes].view(flat.dtype)
            part.copy_(flat[start : start + numel], non_blocking=True)
            parts.append(part)
            start += numel
            self._used += -(-num_bytes // 16) * 16  # where any dtype may begin
        return parts

"""The smallest model that has everything a checkpoint can hold, and hands that forge checkpoints."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spade_t5.checkpoint import CheckpointSaver, Retention, SaveReport, take_snapshot
from spade_t5.checkpoint.manifest import MANIFEST, file_entry, write_manifest
from spade_t5.training import distributed
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import Backend, SingleProcess
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.deepspeed import DeepSpeedBackend
from spade_t5.training.optimizers import AdamWConfig, OptimizerConfig

KEEP_ALL = Retention(keep_last=99)
ADAMW = AdamWConfig(learning_rate=0.1, weight_decay=0.1)


class Tied(nn.Module):
    """Two tied matrices, one frozen vector, one persistent buffer."""

    def __init__(self, width: int = 6) -> None:
        """Draws the weights."""
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("count", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """A vector for every row."""
        return self.second(torch.tanh(self.first(x))) * self.frozen


def tiny_backend(
    *, optimizer: OptimizerConfig = ADAMW, seed: int = 0, zero_stage: int | None = None, width: int = 6
) -> Backend:
    """A fresh `Tied` under an optimizer; under DeepSpeed where a ZeRO stage is given, once processes have joined."""
    torch.manual_seed(seed)
    zero = None if zero_stage is None else DeepSpeedConfig(zero_stage=zero_stage, persistence_threshold_numel=1)  # type: ignore[arg-type]
    config = TrainingConfig(
        steps=9,
        global_batch_rows=distributed.world_size(),
        micro_batch_rows=1,
        optimizer=optimizer,
        deepspeed=zero,
    )
    return SingleProcess(Tied(width), config) if zero is None else DeepSpeedBackend(Tied(width), config)


def train(backend: Backend, steps: Iterable[int], average: WeightAverage | None = None) -> list[float]:
    """Steps on rows that the number of the step decides, the same on every rank; returns the losses."""
    width = backend.module.width
    assert isinstance(width, int)
    losses = []
    for step in steps:
        rows = torch.randn(4, width, generator=torch.Generator().manual_seed(step)).to(distributed.device())
        loss = (backend.model(rows) - 1).square().mean()
        backend.backward(loss)
        backend.step(1.0)
        losses.append(float(loss.detach()))
        if average is not None:
            average.update()
    return losses


def save(
    folder: Path, backend: Backend, step: int, *, average: WeightAverage | None = None, **facts: Any
) -> SaveReport:
    """Writes a checkpoint, keeps all others, and waits."""
    saver = CheckpointSaver(folder, KEEP_ALL)
    try:
        saver.save(take_snapshot(backend, step=step, facts={"tokens": step, **facts}, average=average))
        report = saver.wait()
    finally:
        saver.close()
    assert report is not None
    return report


def forge(path: Path, changes: dict[str, Any] | None = None, **facts: Any) -> None:
    """Makes the manifest of a checkpoint agree with its files, as one who can write to the folder may do.

    Args:
        path: the checkpoint.
        changes: values put over those of `state.json` before.
        facts: values put over those of the manifest.
    """
    if changes is not None:
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, **changes}))
    old = json.loads((path / MANIFEST).read_text())
    kept = {name: value for name, value in old.items() if name not in ("files", "sha256")}
    (path / MANIFEST).unlink()
    write_manifest(path, {each.name: file_entry(each) for each in path.iterdir()}, **{**kept, **facts})

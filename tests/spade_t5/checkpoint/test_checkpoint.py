"""Checkpoints: equality after a round trip for every optimizer, damage named, older ones kept, nothing half-written."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spade_t5.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights_into,
    read_weights,
    save_checkpoint,
)
from spade_t5.errors import DataError
from spade_t5.training.backend import SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.optimizers import AdafactorConfig, AdamWConfig, OptimizerConfig, RMSScaledAdamWConfig, SGDConfig

OPTIMIZERS = [
    AdamWConfig(learning_rate=0.1, weight_decay=0.1),
    SGDConfig(learning_rate=0.1, momentum=0.9),
    RMSScaledAdamWConfig(learning_rate=0.1),
    AdafactorConfig(learning_rate=0.1),
]


class Tied(nn.Module):
    """Two tied matrices, one frozen vector, one persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("count", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.frozen


def backend(optimizer: OptimizerConfig, seed: int) -> SingleProcess:
    torch.manual_seed(seed)
    return SingleProcess(Tied(), TrainingConfig(steps=9, global_batch_rows=1, micro_batch_rows=1, optimizer=optimizer))


def train(trained: SingleProcess, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = (trained.model(torch.randn(4, 6)) - 1).square().mean()
        trained.backward(loss)
        trained.step(1.0)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
def test_resuming_gives_the_same_losses(optimizer: OptimizerConfig, tmp_path: Path) -> None:
    straight = backend(optimizer, seed=0)
    train(straight, range(3))
    path = save_checkpoint(tmp_path, straight, step=3, facts={"tokens": 5}, keep=2)
    resumed = backend(optimizer, seed=1)
    state = load_checkpoint(path, resumed)
    assert (state["step"], state["tokens"]) == (3, 5)
    for name, tensor in straight.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    assert train(resumed, range(3, 8)) == train(straight, range(3, 8))


def test_weights_are_whole_and_tied_ones_stored_once(tmp_path: Path) -> None:
    trained = backend(OPTIMIZERS[0], seed=0)
    train(trained, range(1))
    weights = read_weights(save_checkpoint(tmp_path, trained, step=1, facts={}, keep=1))
    assert set(weights) == {"first.weight", "first.bias", "second.bias", "frozen", "count"}
    fresh = Tied()
    load_weights_into(fresh, tmp_path / "step-00000001")
    assert torch.equal(fresh.second.weight, trained.module.first.weight)  # type: ignore[union-attr, arg-type]


def test_only_the_newest_are_kept_and_unfinished_ones_are_no_checkpoints(tmp_path: Path) -> None:
    trained = backend(OPTIMIZERS[1], seed=0)
    train(trained, range(1))
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, trained, step=step, facts={}, keep=2)
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / "step-00000005").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert latest_checkpoint(tmp_path, 2) == tmp_path / "step-00000002"


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "frozen.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named(file: str, damage: str, tmp_path: Path) -> None:
    trained = backend(OPTIMIZERS[0], seed=0)
    train(trained, range(1))
    path = save_checkpoint(tmp_path, trained, step=1, facts={}, keep=1)
    content = bytearray((path / file).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (path / file).write_bytes(content)
    elif damage == "truncate":
        (path / file).write_bytes(content[:-1])
    else:
        (path / file).unlink()
    before = {name: tensor.clone() for name, tensor in trained.module.state_dict().items()}
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        load_checkpoint(path, trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.module.state_dict().items())


def test_another_model_is_refused(tmp_path: Path) -> None:
    trained = backend(OPTIMIZERS[0], seed=0)
    train(trained, range(1))
    path = save_checkpoint(tmp_path, trained, step=1, facts={}, keep=1)
    other = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    with pytest.raises(DataError, match="its trained parameters are not the model's"):
        load_checkpoint(path, other)

"""Round trips: equality for every optimizer, averages, tied weights stored once, another model refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spade_t5.checkpoint import latest_checkpoint, load_checkpoint, load_weights_into, read_weights, save_checkpoint
from spade_t5.errors import DataError
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import Tied, save, tiny_backend, train
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.optimizers import AdafactorConfig, AdamWConfig, OptimizerConfig, RMSScaledAdamWConfig, SGDConfig

OPTIMIZERS = [
    AdamWConfig(learning_rate=0.1, weight_decay=0.1),
    SGDConfig(learning_rate=0.1, momentum=0.9),
    RMSScaledAdamWConfig(learning_rate=0.1),
    AdafactorConfig(learning_rate=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
def test_resuming_gives_the_same_losses(optimizer: OptimizerConfig, tmp_path: Path) -> None:
    straight = tiny_backend(optimizer=optimizer)
    train(straight, range(3))
    path = save_checkpoint(tmp_path, straight, step=3, facts={"tokens": 5}, keep=2)
    resumed = tiny_backend(optimizer=optimizer, seed=1)
    state = load_checkpoint(path, resumed)
    assert (state["step"], state["tokens"]) == (3, 5)
    for name, tensor in straight.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    assert train(resumed, range(3, 8)) == train(straight, range(3, 8))


def test_saving_at_every_step_does_not_change_training(tmp_path: Path) -> None:
    with_saves, without = tiny_backend(), tiny_backend()
    losses = []
    for step in range(1, 6):
        losses += train(with_saves, [step])
        save(tmp_path, with_saves, step)
    assert losses == train(without, range(1, 6))
    for name, tensor in without.module.state_dict().items():
        assert torch.equal(tensor, with_saves.module.state_dict()[name]), name


def test_averages_are_restored_and_read(tmp_path: Path) -> None:
    trained = tiny_backend()
    average = WeightAverage(trained.fragments(), 0.5)
    train(trained, range(3), average)
    path = save(tmp_path, trained, 3, average=average).path
    resumed = tiny_backend(seed=1)
    own = WeightAverage(resumed.fragments(), 0.5)
    load_checkpoint(path, resumed, average=own)
    for fragment, other in zip(trained.fragments(), resumed.fragments(), strict=True):
        assert torch.equal(average.flat(fragment), own.flat(other))
    weights = read_weights(path, is_averaged=True)
    assert set(weights) == set(read_weights(path))
    for fragment in trained.fragments():
        assert torch.equal(weights[fragment.name], average.flat(fragment))
        assert not torch.equal(weights[fragment.name], fragment.flat)


def test_an_average_starts_from_the_weights_where_there_was_none(tmp_path: Path) -> None:
    trained = tiny_backend()
    train(trained, range(2))
    path = save(tmp_path, trained, 2).path
    resumed = tiny_backend(seed=1)
    average = WeightAverage(resumed.fragments(), 0.5)
    load_checkpoint(path, resumed, average=average)
    for fragment in resumed.fragments():
        assert torch.equal(average.flat(fragment), fragment.flat)
    with pytest.raises(DataError, match="holds no averages") as refusal:
        read_weights(path, is_averaged=True)
    documented(str(refusal.value))


def test_weights_are_whole_and_tied_ones_stored_once(tmp_path: Path) -> None:
    trained = tiny_backend()
    train(trained, range(1))
    weights = read_weights(save(tmp_path, trained, 1).path)
    assert set(weights) == {"first.weight", "first.bias", "second.bias", "frozen", "count"}
    fresh = Tied()
    load_weights_into(fresh, tmp_path / "step-00000001")
    assert torch.equal(fresh.second.weight, trained.module.first.weight)  # type: ignore[union-attr, arg-type]


def test_unfinished_ones_are_no_checkpoints(tmp_path: Path) -> None:
    trained = tiny_backend()
    for step in (2, 3):
        save(tmp_path, trained, step)
    (tmp_path / ".step-00000004.tmp").mkdir()
    (tmp_path / "step-00000005").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert latest_checkpoint(tmp_path, 2) == tmp_path / "step-00000002"
    assert latest_checkpoint(tmp_path, 7) is None


class Wider(Tied):
    """`Tied` with another frozen vector."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)


class Longer(Tied):
    """`Tied` with one more buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("more", torch.zeros(2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "its trained parameters are not the model's (such as bias)"),
        (Wider(), "frozen has shape (6,), the model needs (7,)"),
        (Longer(), "lacks more"),
    ],
)
def test_another_model_is_refused_before_anything_is_changed(model: nn.Module, message: str, tmp_path: Path) -> None:
    trained = tiny_backend()
    train(trained, range(1))
    path = save(tmp_path, trained, 1).path
    other = SingleProcess(model, TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError) as refusal:
        load_checkpoint(path, other)
    assert message in str(refusal.value)
    documented(str(refusal.value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, tiny_backend(), 1).path
    with pytest.raises(DataError) as refusal:
        load_weights_into(nn.Linear(2, 2), path)
    documented(str(refusal.value))

"""Several ranks: any world size and ZeRO stage reads what any other wrote, and all ranks fail or reject alike."""

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spade_t5.checkpoint import (
    CheckpointSaver,
    load_checkpoint,
    newest_good_checkpoint,
    read_weights,
    take_snapshot,
    verify_checkpoint,
    writing,
)
from spade_t5.errors import DataError, RunAbortedError, SaveError
from spade_t5.testing import disks, documented
from spade_t5.testing.checkpoints import KEEP_ALL, save, tiny_backend, train
from spade_t5.testing.ranks import call_on_ranks
from spade_t5.training import distributed
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import Backend
from spade_t5.training.deepspeed import start_processes
from spade_t5.training.optimizers import AdamWConfig, OptimizerConfig, RMSScaledAdamWConfig

OPTIMIZERS: dict[str, OptimizerConfig] = {
    "adamw": AdamWConfig(learning_rate=0.1, weight_decay=0.1),
    "rms_scaled_adamw": RMSScaledAdamWConfig(learning_rate=0.1),
}
WIDTH = 7  # 49 + 7 + 7 elements: no number of ranks divides them


def save_trained(folder: str, stage: int, optimizer: str) -> None:
    """Trains two steps on all ranks and saves."""
    start_processes()
    trained = tiny_backend(optimizer=OPTIMIZERS[optimizer], zero_stage=stage, width=WIDTH)
    average = WeightAverage(trained.fragments(), 0.5)
    train(trained, [1, 2], average)
    save(Path(folder), trained, 2, average=average)
    distributed.shutdown()


def load_and_save(folders: list[str], stages: list[int], optimizer: str) -> list[list[float]]:
    """Hands a checkpoint from folder to folder through engines of these stages; returns the losses of two more steps of each."""
    start_processes()
    losses = []
    for stage, source, target in zip(stages, folders[:-1], folders[1:], strict=True):
        losses.append(hand_on(source, target, stage, optimizer))
    distributed.shutdown()
    return losses


def hand_on(source: str, target: str, stage: int | None, optimizer: str) -> list[float]:
    """Loads into a fresh backend, saves, and trains two more steps."""
    backend = tiny_backend(optimizer=OPTIMIZERS[optimizer], zero_stage=stage, width=WIDTH, seed=1)
    average = WeightAverage(backend.fragments(), 0.5)
    path = newest_good_checkpoint(Path(source))
    assert path is not None
    load_checkpoint(path, backend, average=average, is_verified=True)
    save(Path(target), backend, 2, average=average)
    return train(backend, [3, 4], average)


def contents(folder: str | Path) -> dict[str, Tensor]:
    """Every state of every parameter, whole, put together from the files by the index, and what is frozen."""
    path = Path(folder) / "step-00000002"
    verify_checkpoint(path)
    state = json.loads((path / "state.json").read_text())
    whole = dict(load_file(path / "frozen.safetensors"))
    for key, names in state["index"].items():
        for name, pieces in names.items():
            pieces.sort(key=lambda piece: piece[1])
            whole[f"{key}/{name}"] = torch.cat([load_file(path / file)[f"{key}/{name}"] for file, _, _ in pieces])
    for key, names in state["scalars"].items():
        whole |= {f"{key}/{name}": torch.tensor(number) for name, number in names.items()}
    return whole


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_from_any_to_any(optimizer: str, tmp_path: Path) -> None:
    folders = [str(tmp_path / str(number)) for number in range(7)]
    straight = tiny_backend(optimizer=OPTIMIZERS[optimizer], width=WIDTH)
    own_losses = train(straight, [1, 2, 3, 4])
    call_on_ranks(
        save_trained,
        {"folder": folders[0], "stage": 3, "optimizer": optimizer},
        num_ranks=2,
        log_dir=tmp_path / "logs",
    )
    losses = [hand_on(folders[0], folders[1], None, optimizer)]
    arguments = {"folders": folders[1:3], "stages": [1], "optimizer": optimizer}
    losses += call_on_ranks(load_and_save, arguments, num_ranks=3, log_dir=tmp_path / "logs")[0]
    arguments = {"folders": folders[2:], "stages": [3, 2, 0, 1], "optimizer": optimizer}
    losses += call_on_ranks(load_and_save, arguments, num_ranks=2, log_dir=tmp_path / "logs")[0]
    first = contents(folders[0])
    states = {"weight", "ema", "exp_avg", "exp_avg_sq", "step"}
    trained = {"first.weight", "first.bias", "second.bias"}
    assert set(first) == {"frozen", "count", *(f"{state}/{name}" for state in states for name in trained)}
    for folder in folders[1:]:
        other = contents(folder)
        assert set(other) == set(first)
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), f"{folder}: {name}"
    for found in losses:
        assert found == pytest.approx(own_losses[2:], rel=1e-6)
    whole = read_weights(Path(folders[0]) / "step-00000002", is_averaged=True)
    assert torch.equal(whole["first.weight"].flatten(), first["ema/first.weight"])


def message_of_save(writer: CheckpointSaver, backend: Backend, step: int) -> str | None:
    writer.save(take_snapshot(backend, step=step, facts={}))
    try:
        writer.wait()
    except SaveError as error:
        return str(error)
    return None


def fail_on_rank_1(folder: str) -> list[str | None]:
    """The disk of rank 1 fails in the second of three saves; returns the messages."""
    start_processes()
    backend = tiny_backend(zero_stage=1)
    train(backend, [1])
    writer = CheckpointSaver(Path(folder), KEEP_ALL)
    messages: list[str | None] = []
    write = writing.write_tensors
    for step in (1, 2, 3):
        writing.write_tensors = broken_disk if step == 2 and distributed.rank() == 1 else write
        messages.append(message_of_save(writer, backend, step))
    writer.close()
    distributed.shutdown()
    return messages


def broken_disk(path: Path, tensors: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error", str(path))


def test_a_failure_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = call_on_ranks(fail_on_rank_1, {"folder": str(folder)}, num_ranks=2, log_dir=tmp_path / "logs")
    assert first == second
    good, message, again = first
    assert good is again is None
    assert "rank-00001.safetensors: Input/output error" in message
    documented(message)
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000003"]


def lose_rank_1(folder: str, log_dir: str) -> str:
    """Rank 1 ends while it writes; returns what rank 0 says."""
    start_processes()
    backend = tiny_backend(zero_stage=1)
    writer = CheckpointSaver(Path(folder), KEEP_ALL, timeout_seconds=60)
    if distributed.rank() == 1:
        Path(log_dir, "rank-1.json").write_text("null")
        writing.write_tensors = end_here
    writer.save(take_snapshot(backend, step=1, facts={}))
    with pytest.raises(RunAbortedError) as caught:
        writer.wait()
    assert not isinstance(caught.value, SaveError)
    return str(caught.value)


def end_here(path: Path, tensors: Any) -> Any:
    os._exit(0)


def test_a_rank_that_is_gone(tmp_path: Path) -> None:
    folder, logs = tmp_path / "checkpoints", tmp_path / "logs"
    arguments = {"folder": str(folder), "log_dir": str(logs)}
    message, _ = call_on_ranks(lose_rank_1, arguments, num_ranks=2, log_dir=logs)
    assert "the ranks lost each other" in message
    documented(message)
    assert newest_good_checkpoint(folder) is None


def lag(folder: str, stage: str) -> list[str]:
    """One rank takes longer than the others wait for it, in its part of writing or of publishing; returns what two saves say."""
    start_processes()
    backend = tiny_backend(zero_stage=1)
    others_are_gone, slow_rank = Path(folder, "gone"), 1 if stage == "write" else 0

    def linger(*_: Any) -> dict[str, Any]:
        if distributed.rank() == slow_rank:
            for _ in range(6000):
                if others_are_gone.exists():
                    break
                time.sleep(0.01)
        return {}

    def linger_and_fail(path: Path, tensors: Any) -> Any:
        linger()
        broken_disk(path, tensors)

    if stage == "write" and distributed.rank() == slow_rank:
        writing.write_tensors = linger_and_fail
    checkpoints = Path(folder, "checkpoints")
    distributed.barrier()
    writer = CheckpointSaver(
        checkpoints, KEEP_ALL, before_publishing=linger if stage == "publish" else None, timeout_seconds=3
    )
    messages = []
    for step in (1, 2):
        writer.save(take_snapshot(backend, step=step, facts={}))
        with pytest.raises(RunAbortedError) as caught:
            writer.wait()
        assert not isinstance(caught.value, SaveError)  # which would be tried again
        messages.append(str(caught.value))
        if distributed.rank() != slow_rank:
            others_are_gone.touch()
    writer.close()
    return messages


@pytest.mark.parametrize("stage", ["write", "publish"])
def test_ranks_that_lost_each_other_end_the_run(stage: str, tmp_path: Path) -> None:
    """Their group stays broken, so that retrying would train on and never save again."""
    arguments = {"folder": str(tmp_path), "stage": stage}
    ranks = call_on_ranks(lag, arguments, num_ranks=2, log_dir=tmp_path / "logs")
    for first, second in ranks:
        documented(first)
        documented(second)
        assert first.count("the checkpoint of step 1") == 1
        assert "the ranks lost each other" in first
        assert "step 2 was not written: the ranks lost each other" in second
    is_written = (tmp_path / "checkpoints" / "step-00000001").exists()
    assert is_written == (stage == "publish")
    if is_written:
        verify_checkpoint(tmp_path / "checkpoints" / "step-00000001")
        assert all("step 1 may or may not have been written" in first for first, _ in ranks)
    else:
        assert "Input/output error" in ranks[1][0]


def break_a_moment(folder: str, state: str) -> str:
    """A value of rank 1's shard of the optimizer is no number any more; returns what this rank says."""
    start_processes()
    backend = tiny_backend(zero_stage=2)
    train(backend, [1])
    save(Path(folder), backend, 1)
    if distributed.rank() == 1:
        fragment = backend.fragments()[0]
        with torch.no_grad():
            backend.optimizer.state[fragment.flat][state].view(-1)[fragment.start] = float("nan")
    with pytest.raises(SaveError) as caught:
        save(Path(folder), backend, 2)
    distributed.shutdown()
    return str(caught.value)


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq"])
def test_a_moment_of_one_shard_that_is_not_finite_is_saved_by_no_rank(state: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    arguments = {"folder": str(folder), "state": state}
    first, second = call_on_ranks(break_a_moment, arguments, num_ranks=2, log_dir=tmp_path / "logs")
    assert first == second
    assert f"step 2 was not written: {state}/" in first
    assert "holds numbers that are not finite" in first
    documented(first)
    assert os.listdir(folder) == ["step-00000001"]
    verify_checkpoint(folder / "step-00000001")


def time_a_save(folder: str) -> list[dict[str, Any]]:
    """Rank 1 begins half a second late; returns the report."""
    start_processes()
    backend = tiny_backend(zero_stage=1)
    writer = CheckpointSaver(Path(folder), KEEP_ALL)
    taken = take_snapshot(backend, step=1, facts={})
    if distributed.rank() == 1:
        time.sleep(0.5)
    writer.save(taken)
    report = writer.wait()
    writer.close()
    distributed.shutdown()
    assert report is not None
    return [report.as_json()]


def test_times_are_those_of_the_slowest_rank(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path / "checkpoints")}
    first, second = call_on_ranks(time_a_save, arguments, num_ranks=2, log_dir=tmp_path / "logs")
    assert first == second
    assert first[0]["write_seconds"] > 0.4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    with disks.small_disk(tmp_path / "disk", "3m") as path:
        yield path


def fill_disk(folder: str) -> list[str | None]:
    """Saves 1.1 MB three times; returns the messages."""
    start_processes()
    backend = tiny_backend(zero_stage=1, width=300)
    train(backend, [1])
    writer = CheckpointSaver(Path(folder), KEEP_ALL)
    messages: list[str | None] = []
    for step in (1, 2, 3):
        messages.append(message_of_save(writer, backend, step))
    writer.close()
    distributed.shutdown()
    return messages


def test_all_ranks_say_that_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    folder = small_disk / "checkpoints"
    first, second = call_on_ranks(fill_disk, {"folder": str(folder)}, num_ranks=2, log_dir=tmp_path / "logs")
    assert first == second
    assert first[:2] == [None, None]
    documented(first[2])
    assert "No space left on device, the checkpoint needs 1,1" in first[2]
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002"]
    for path in folder.iterdir():
        verify_checkpoint(path)


def choose(folder: str) -> list[str | None]:
    """What this rank takes for the newest good checkpoint, as it is, and when none is good."""
    start_processes()
    newest = newest_good_checkpoint(Path(folder))
    distributed.barrier()
    if distributed.is_main():
        for path in Path(folder).glob("*/rank-00001.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
    distributed.barrier()
    try:
        newest_good_checkpoint(Path(folder))
        message = None
    except DataError as error:
        message = str(error)
    distributed.shutdown()
    return [newest and newest.name, message]


def test_all_ranks_reject_alike(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    call_on_ranks(fail_on_rank_1, {"folder": str(folder)}, num_ranks=2, log_dir=tmp_path / "logs")
    (folder / "step-00000003" / "frozen.safetensors").unlink()
    first, second = call_on_ranks(choose, {"folder": str(folder)}, num_ranks=2, log_dir=tmp_path / "logs")
    assert first == second
    assert first[0] == "step-00000001"
    documented(first[1])


def test_a_process_group_of_one(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path / "checkpoints"), "stage": 2, "optimizer": "adamw"}
    call_on_ranks(save_trained, arguments, num_ranks=1, log_dir=tmp_path / "logs")
    assert set(contents(tmp_path / "checkpoints")) > {"ema/first.weight", "weight/first.weight"}

"""Writing behind the training: order, permissions, and what a failing or dying writer leaves behind."""

import errno
import json
import os
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5.checkpoint import (
    CheckpointSaver,
    Retention,
    list_checkpoints,
    load_checkpoint,
    newest_good_checkpoint,
    read_weights,
    remove_unfinished,
    take_snapshot,
    verify_checkpoint,
    writing,
)
from spade_t5.checkpoint.manifest import create, read_manifest
from spade_t5.errors import RunAbortedError, SaveError
from spade_t5.testing import disks, documented
from spade_t5.testing.checkpoints import KEEP_ALL, save, tiny_backend, train
from spade_t5.testing.ranks import call_on_ranks
from spade_t5.training.backend import Backend


class Gate:
    """Holds every writer back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        write = writing.write_tensors

        def wait_and_write(*arguments: Any) -> Any:
            assert self.is_open.wait(60)
            return write(*arguments)

        monkeypatch.setattr(writing, "write_tensors", wait_and_write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.is_open.set()


@pytest.fixture
def trained() -> Backend:
    backend = tiny_backend()
    train(backend, [1])
    return backend


def snapshot(backend: Backend, step: int) -> Any:
    return take_snapshot(backend, step=step, facts={"tokens": step})


def test_training_goes_on_while_a_checkpoint_is_written(trained: Backend, gate: Gate, tmp_path: Path) -> None:
    writer = CheckpointSaver(tmp_path, KEEP_ALL)
    assert writer.wait() is None
    assert not writer.is_finished
    before = trained.module.first.weight.detach().clone()  # type: ignore[union-attr]
    facts = {"cursor": {"rows": [1]}}
    writer.save(take_snapshot(trained, step=1, facts=facts))
    assert not writer.is_finished
    train(trained, [2])
    facts["cursor"]["rows"].append(2)
    with pytest.raises(RuntimeError, match="a save is in flight"):
        writer.save(snapshot(trained, 2))
    assert list_checkpoints(tmp_path) == []
    gate.is_open.set()
    report = writer.wait()
    assert report is not None
    assert (report.step, report.path) == (1, tmp_path / "step-00000001")
    assert json.loads(json.dumps(report.as_json()))["num_bytes"] == report.num_bytes > 0
    assert report.write_seconds >= report.hash_seconds + report.sync_seconds > 0
    assert writer.wait() is None
    assert torch.equal(read_weights(report.path)["first.weight"], before)
    assert load_checkpoint(report.path, tiny_backend())["cursor"] == {"rows": [1]}
    writer.save(snapshot(trained, 2))
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_of_a_gpu_are_pinned_and_complete(
    trained: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tensor takes several pinned blocks, and training changes it at once."""
    monkeypatch.setattr("spade_t5.checkpoint.snapshot.PINNED_BLOCK_BYTES", 64)
    before = trained.module.first.weight.detach().cpu().clone()  # type: ignore[union-attr]
    taken = snapshot(trained, 1)
    train(trained, [2])
    parts = taken.files["rank-00000.safetensors"]["weight/first.weight"].parts
    assert len(parts) > 1
    assert all(part.is_pinned() for part in parts)
    writer = CheckpointSaver(tmp_path, KEEP_ALL)
    writer.save(taken)
    report = writer.wait()
    assert report is not None
    assert torch.equal(read_weights(report.path)["first.weight"], before)


def test_the_end_of_a_save_is_seen_without_waiting(trained: Backend, tmp_path: Path) -> None:
    writer = CheckpointSaver(tmp_path, KEEP_ALL)
    writer.save(snapshot(trained, 1))
    for thread in threading.enumerate():
        if thread.name == "checkpoint-writer":
            thread.join(60)
    assert writer.is_finished
    writer.wait()
    assert not writer.is_finished


def test_closing_lets_a_failing_save_end(
    trained: Backend, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointSaver(tmp_path / "checkpoints", KEEP_ALL)
    writer.save(snapshot(trained, 1))
    shutil.rmtree(tmp_path / "checkpoints")
    gate.is_open.set()
    writer.close()
    documented(caplog.messages[-1])


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_may_write(umask: int, trained: Backend, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path / "run" / "checkpoints", trained, 1).path
    finally:
        os.umask(before)
    for each in (path.parent, path, *path.iterdir()):
        mode = stat.S_IMODE(each.stat().st_mode)
        assert mode == (0o755 if each.is_dir() else 0o644) & ~umask, each


def test_an_existing_checkpoint_is_replaced(trained: Backend, tmp_path: Path) -> None:
    save(tmp_path, trained, 1)
    train(trained, [2])
    path = save(tmp_path, trained, 1).path
    assert torch.equal(read_weights(path)["first.weight"], trained.module.first.weight)  # type: ignore[union-attr, arg-type]
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_facts_of_the_lease_are_in_the_manifest_and_its_loss_forbids_to_publish(
    trained: Backend, tmp_path: Path
) -> None:
    writer = CheckpointSaver(tmp_path, KEEP_ALL, before_publishing=lambda: {"lease": "abc"})
    writer.save(snapshot(trained, 1))
    report = writer.wait()
    assert report is not None
    assert read_manifest(report.path)["lease"] == "abc"

    def refuse() -> dict[str, Any]:
        raise RunAbortedError("the lease is lost")

    writer = CheckpointSaver(tmp_path, KEEP_ALL, before_publishing=refuse)
    writer.save(snapshot(trained, 2))
    with pytest.raises(RunAbortedError, match=r"^the lease is lost$") as refusal:
        writer.wait()
    assert not isinstance(refusal.value, SaveError)
    assert os.listdir(tmp_path) == ["step-00000001"]


def poison(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[3] = float("nan")


@pytest.mark.parametrize("state", ["weight", "exp_avg", "exp_avg_sq", "frozen"])
def test_nothing_that_is_not_finite_is_saved(state: str, trained: Backend, tmp_path: Path) -> None:
    save(tmp_path, trained, 1)
    parameter = trained.module.first.weight  # type: ignore[union-attr]
    frozen = trained.module.frozen
    poison({"weight": parameter, "frozen": frozen}.get(state, trained.optimizer.state[parameter].get(state)))  # type: ignore[arg-type, call-overload, index]
    name = "frozen" if state == "frozen" else f"{state}/first.weight"
    with pytest.raises(SaveError, match=f"{name} holds numbers that are not finite") as refusal:
        save(tmp_path, trained, 2)
    documented(str(refusal.value))
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_an_evaluation_that_overflowed_does_not_keep_from_saving(trained: Backend, tmp_path: Path) -> None:
    path = save(tmp_path, trained, 1, held_out_loss=float("inf")).path
    assert "held_out_loss" not in read_manifest(path)
    verify_checkpoint(path)


def failing(function: Callable[..., Any], fails_at: int) -> Callable[..., Any]:
    """The function, but its call of this number fails as on a broken disk."""
    calls = iter(range(1, 10_000))

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*arguments, **named)

    return call


class FailingFile:
    """A file whose first write fails."""

    def __init__(self, path: Path) -> None:
        self._file = create(path)

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: memoryview) -> int:
        self._file.write(content[: len(content) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", ["fsync", "rename", "open", "mkdir"])
def test_every_call_of_the_file_system_may_fail(
    name: str, trained: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointSaver(tmp_path, Retention(keep_last=2))
    for step in (1, 2):
        writer.save(snapshot(trained, step))
        writer.wait()
    failures = 0
    for number in range(1, 100):
        published = [path.name for path in list_checkpoints(tmp_path)]
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), number))
            writer.save(snapshot(trained, number + 2))
            try:
                report = writer.wait()
            except SaveError as error:
                report = None
                message = str(error)
        if report is None:
            failures += 1
            documented(message)
            assert "Input/output error" in message
            assert [path.name for path in list_checkpoints(tmp_path)] == published
            assert sorted(os.listdir(tmp_path)) == published
        for path in list_checkpoints(tmp_path):
            verify_checkpoint(path)
        if report is not None and len(list_checkpoints(tmp_path)) == 2:
            break
    assert failures >= {"fsync": 6, "rename": 1, "open": 6, "mkdir": 1}[name]
    assert number < 99


def test_a_write_that_fails_half_way(trained: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, trained, 1)
    with monkeypatch.context() as patch:
        patch.setattr("spade_t5.checkpoint.tensor_file.create", FailingFile)
        with pytest.raises(SaveError, match="Input/output error") as failure:
            save(tmp_path, trained, 2)
    documented(str(failure.value))
    assert os.listdir(tmp_path) == ["step-00000001"]
    save(tmp_path, trained, 2)


def test_a_disk_that_returns_something_else(trained: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writing.write_tensors

    def write_and_rot(path: Path, tensors: Any) -> Any:
        written = write(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return written

    monkeypatch.setattr(writing, "write_tensors", write_and_rot)
    with pytest.raises(SaveError, match="reads back different from what was written") as failure:
        save(tmp_path, trained, 1)
    documented(str(failure.value))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_vanishes(trained: Backend, gate: Gate, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    writer = CheckpointSaver(folder, KEEP_ALL)
    writer.save(snapshot(trained, 1))
    for thread in threading.enumerate():
        if thread.name == "checkpoint-writer":
            shutil.rmtree(folder)
    gate.is_open.set()
    with pytest.raises(SaveError, match="No such file or directory") as failure:
        writer.wait()
    documented(str(failure.value))
    writer.save(snapshot(trained, 2))
    with pytest.raises(SaveError, match="No such file or directory"):
        writer.wait()
    folder.mkdir()
    writer.save(snapshot(trained, 3))
    writer.wait()
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000003"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Not a directory") as failure:
        CheckpointSaver(tmp_path / "file" / "checkpoints", KEEP_ALL)
    documented(str(failure.value))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    with disks.small_disk(tmp_path / "disk", "3m") as path:
        yield path


def test_a_disk_that_is_full_at_any_point(trained: Backend, small_disk: Path) -> None:
    folder, ballast = small_disk / "checkpoints", small_disk / "ballast"
    writer = CheckpointSaver(folder, KEEP_ALL)
    writer.save(snapshot(trained, 1))
    writer.wait()
    free = shutil.disk_usage(small_disk).free
    failures = 0
    for pages in range(20):
        ballast.write_bytes(bytes(free - pages * 4096))
        writer.save(snapshot(trained, 2))
        try:
            writer.wait()
        except SaveError as error:
            message = str(error)
        else:
            break
        failures += 1
        documented(message)
        assert "No space left on device, the checkpoint needs" in message
        assert f"{pages * 4096:,} are free; free space" in message
        assert os.listdir(folder) == ["step-00000001"]
        verify_checkpoint(folder / "step-00000001")
    assert failures >= 4
    assert newest_good_checkpoint(folder) == folder / "step-00000002"


def test_a_disk_that_turns_read_only(trained: Backend, small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    writer = CheckpointSaver(folder, KEEP_ALL)
    writer.save(snapshot(trained, 1))
    writer.wait()
    disks.remount(small_disk, "ro")
    writer.save(snapshot(trained, 2))
    with pytest.raises(SaveError, match="Read-only file system") as failure:
        writer.wait()
    documented(str(failure.value))
    disks.remount(small_disk, "rw")
    writer.save(snapshot(trained, 3))
    writer.wait()
    assert newest_good_checkpoint(folder) == folder / "step-00000003"


KILLING_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync")


def save_and_die(folder: Path, taken: Any, death: int) -> None:
    """Saves over two other checkpoints, and is killed just before the call of this number to the file system."""
    calls = iter(range(1, 10_000))

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event in KILLING_EVENTS and next(calls) == death:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def audited_fsync(descriptor: int) -> None:
        sys.audit("fsync", descriptor)
        fsync(descriptor)

    os.fsync = audited_fsync
    writer = CheckpointSaver(folder, Retention(keep_last=2))
    sys.addaudithook(die)
    writer.save(taken)
    writer.wait()


def die_everywhere(start: str, folder: str) -> list[dict[str, Any]]:
    """Kills a save at every point; returns what each kill left, and what the next start made of it."""
    backend = tiny_backend()
    train(backend, [1])
    taken = snapshot(backend, 3)
    found: list[dict[str, Any]] = []
    for death in range(1, 200):
        copy = Path(shutil.copytree(start, f"{folder}/{death}"))
        child = os.fork()
        if child == 0:
            save_and_die(copy, taken, death)
            os._exit(0)
        was_killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = sorted(os.listdir(copy))
        for path in list_checkpoints(copy):
            verify_checkpoint(path)
        newest = newest_good_checkpoint(copy)
        remove_unfinished(copy)
        found.append({"left": left, "newest": newest and newest.name, "then": sorted(os.listdir(copy))})
        if not was_killed:
            break
    return found


def test_a_kill_at_every_point_of_a_save(trained: Backend, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / "start", trained, step)
    arguments = {"start": str(tmp_path / "start"), "folder": str(tmp_path)}
    ((*kills, undisturbed),) = call_on_ranks(die_everywhere, arguments, num_ranks=1, log_dir=tmp_path / "logs")
    assert undisturbed["then"] == ["step-00000002", "step-00000003"]
    assert len(kills) > 25
    assert {kill["newest"] for kill in kills} == {"step-00000002", "step-00000003"}
    assert any(".step-00000003.tmp" in kill["left"] for kill in kills)
    assert any(".step-00000001.deleted" in kill["left"] for kill in kills)
    for kill in kills:
        assert not [name for name in kill["then"] if name.startswith(".")]

"""Which checkpoints stay: the newest, regular ones and the best, and always one that is whole."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint import CheckpointSaver, Retention, list_checkpoints, newest_good_checkpoint, take_snapshot
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import save, tiny_backend
from spade_t5.training.backend import Backend

BACKEND_SEED = 0


@pytest.fixture(scope="module")
def backend() -> Backend:
    return tiny_backend(seed=BACKEND_SEED)


def save_all(folder: Path, backend: Backend, retention: Retention, losses: dict[int, float | None]) -> list[int]:
    """Saves steps with their held-out losses; returns those that are left."""
    saver = CheckpointSaver(folder, retention)
    for step, loss in losses.items():
        facts = {} if loss is None else {"held_out_loss": loss}
        saver.save(take_snapshot(backend, step=step, facts=facts))
        saver.wait()
    saver.close()
    return steps(folder)


def steps(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [50, 60]),
        (Retention(keep_last=1), [60]),
        (Retention(keep_last=1, keep_every_steps=20), [20, 40, 60]),
        (Retention(keep_last=1, keep_best=2), [20, 40, 60]),
        (Retention(keep_last=2, keep_every_steps=30, keep_best=1), [20, 30, 50, 60]),
        (Retention(keep_last=9), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_the_rules(retention: Retention, left: list[int], backend: Backend, tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: None}
    assert save_all(tmp_path, backend, retention, losses) == left
    assert len(os.listdir(tmp_path)) == len(left)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_last": 0}, "keep_last: 0"),
        ({"keep_every_steps": 0}, "keep_every_steps: 0"),
        ({"keep_best": -1}, "keep_best: -1"),
    ],
)
def test_rules_that_keep_nothing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retention(**values)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "manifest.json"])
def test_a_torn_checkpoint_does_not_displace_a_whole_one(name: str, backend: Backend, tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, backend, step)
    torn = tmp_path / "step-00000002" / name
    torn.write_bytes(torn.read_bytes()[:-7])
    assert save_all(tmp_path, backend, Retention(keep_last=2), {3: None}) == [1, 3]


def test_the_newest_on_disk_is_corrupt_at_every_save(backend: Backend, tmp_path: Path) -> None:
    """What was just read back is never deleted, so that there is always one to go back to."""
    retention = Retention(keep_last=1)
    for step in range(1, 5):
        save_all(tmp_path, backend, retention, {step: None})
        assert newest_good_checkpoint(tmp_path) == tmp_path / f"step-{step:08d}"
        flipped = tmp_path / f"step-{step:08d}" / "rank-00000.safetensors"
        flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")


def test_newer_ones_are_not_deleted(backend: Backend, tmp_path: Path) -> None:
    save(tmp_path, backend, 9)
    assert save_all(tmp_path, backend, Retention(keep_last=1), {3: None}) == [3, 9]


def test_what_cannot_be_deleted_is_reported(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, backend, 1)

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".step-00000001.deleted" and not ignore_errors:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "spade_t5"):
        patch.setattr(shutil, "rmtree", fail)
        assert save_all(tmp_path, backend, Retention(keep_last=1), {2: None}) == [2]
    documented(caplog.messages[-1])
    assert save_all(tmp_path, backend, Retention(keep_last=1), {3: None}) == [3]

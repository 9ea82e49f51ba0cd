"""Checkpoints that cannot be written, or take longer than the steps between them, through the engine."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint import list_checkpoints, verify_checkpoint
from spade_t5.errors import SaveError
from spade_t5.testing import documented
from spade_t5.training.engine import Trainer
from spade_t5.training.reporting import read_lines

MakeTrainer = Callable[..., Trainer]
EVERY_STEP = {"save_every_steps": 1, "keep_checkpoints": 99}


def on_fsync_of(step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something before each file of the unfinished checkpoint of a step is forced to disk."""
    fsync = os.fsync

    def call(descriptor: int) -> None:
        if f".step-{step:08d}.tmp/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            action()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", call)


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole_checkpoints(run_dir: Path) -> list[int]:
    """The steps of the checkpoints, all of which are whole, and beside which there is nothing."""
    paths = list_checkpoints(run_dir / "checkpoints")
    assert sorted(path.name for path in paths) == sorted(os.listdir(run_dir / "checkpoints"))
    return [verify_checkpoint(path)["step"] for path in paths]


def test_a_run_stops_where_a_checkpoint_cannot_be_written(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fsync_of(2, fail, monkeypatch)
    with pytest.raises(SaveError, match=r"step 2 was not written.*No space left on device") as caught:
        make_trainer(tmp_path / "run", on_save_error="stop", **EVERY_STEP).fit()
    documented(str(caught.value))
    assert whole_checkpoints(tmp_path / "run") == [1]


def test_a_run_that_retries_goes_on_to_the_next_checkpoint(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_fsync_of(2, fail, monkeypatch)
    make_trainer(tmp_path / "run", on_save_error="retry", **EVERY_STEP).fit()
    (failed,) = (event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "save_failed")
    assert failed["reason"].startswith("the checkpoint of step 2 was not written")
    (warning,) = (message for message in caplog.messages if "the next checkpoint is tried when it is due" in message)
    documented(warning)
    assert whole_checkpoints(tmp_path / "run") == [1, 3, 4]


@pytest.mark.parametrize("policy", ["stop", "retry"])
def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(
    policy: str, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fsync_of(4, fail, monkeypatch)
    with pytest.raises(SaveError, match="step 4 was not written"):
        make_trainer(tmp_path / "run", on_save_error=policy, **EVERY_STEP).fit()
    assert whole_checkpoints(tmp_path / "run") == [1, 2, 3]


def test_a_checkpoint_that_comes_due_waits_for_the_one_before(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes until the second save is due; training went on meanwhile."""
    is_due = threading.Event()
    waited_for: list[list[int]] = []
    trainer = make_trainer(tmp_path / "run", **EVERY_STEP)
    wait = trainer._saver.wait

    def open_and_wait() -> Any:
        if trainer._step == 2 and not is_due.is_set():
            assert not trainer._saver.is_finished
            waited_for.append([int(path.name[5:]) for path in list_checkpoints(tmp_path / "run" / "checkpoints")])
            is_due.set()
        return wait()

    on_fsync_of(1, lambda: None if is_due.wait(60) else fail(), monkeypatch)
    monkeypatch.setattr(trainer._saver, "wait", open_and_wait)
    trainer.fit()
    assert waited_for == [[]]
    assert whole_checkpoints(tmp_path / "run") == [1, 2, 3, 4]
    saved = [Path(event["path"]).name for event in read_lines(tmp_path / "run" / "events.jsonl") if "path" in event]
    assert saved == [f"step-0000000{step}" for step in (1, 2, 3, 4)]

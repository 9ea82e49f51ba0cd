"""Asking a run that goes on for a checkpoint."""

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spade_t5.checkpoint import checkpoint_path
from spade_t5.checkpoint.request import REQUEST_FILE, checkpoint_now, request_checkpoint, take_request
from spade_t5.errors import ConfigError, DataError
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import save, tiny_backend
from spade_t5.training.lease import LEASE_FILE, Lease


class Run(threading.Thread):
    """A run that looks for a request after each step, and for which a step of work is 10 ms."""

    def __init__(self, run_dir: Path, *, last_step: int, is_deaf: bool = False) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.step, self.last_step, self.is_deaf = run_dir, 100, last_step, is_deaf
        self.lease = Lease(run_dir, on_loss=lambda: None)
        self.lease.take()
        self.start()

    def run(self) -> None:
        backend = tiny_backend()
        while self.step < self.last_step:
            time.sleep(0.01)
            self.step += 1
            if not self.is_deaf and take_request(self.run_dir):
                save(self.run_dir / "checkpoints", backend, self.step)
        self.lease.release()


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "checkpoints" / ".step-00000001.tmp").mkdir(parents=True)
    yield tmp_path
    for thread in threading.enumerate():
        if isinstance(thread, Run):
            thread.last_step = 0
            thread.join(60)


def test_a_request_is_taken_once(tmp_path: Path) -> None:
    assert not take_request(tmp_path)
    request_checkpoint(tmp_path)
    request_checkpoint(tmp_path)
    assert take_request(tmp_path)
    assert not take_request(tmp_path)


def test_a_request_is_not_for_all_to_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        request_checkpoint(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / REQUEST_FILE).stat().st_mode) == 0o644


def test_the_run_answers(run_dir: Path) -> None:
    old = save(run_dir / "checkpoints", tiny_backend(), 1).path
    Run(run_dir, last_step=10_000)
    new = checkpoint_now(run_dir, timeout_seconds=60)
    assert new != old
    assert new.parent == old.parent


def test_no_run_no_answer(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no run is going on") as refusal:
        checkpoint_now(run_dir, timeout_seconds=60)
    documented(str(refusal.value))
    dead = {"host": os.uname().nodename, "machine": "", "pid": 1, "started": "0", "token": "x", "renewed": 0.0}
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    dead |= {"machine": f"{boot}/{os.readlink('/proc/self/ns/pid')}", "pid": 2**22 + 1}
    (run_dir / LEASE_FILE).write_text(json.dumps(dead))
    with pytest.raises(ConfigError, match="no run is going on"):
        checkpoint_now(run_dir, timeout_seconds=60)
    assert not (run_dir / REQUEST_FILE).exists()


def test_a_run_that_ends_first(run_dir: Path) -> None:
    Run(run_dir, last_step=120, is_deaf=True)
    with pytest.raises(DataError, match="ended before it saved") as refusal:
        checkpoint_now(run_dir, timeout_seconds=60)
    documented(str(refusal.value))
    assert not (run_dir / REQUEST_FILE).exists()


def test_a_run_that_does_not_answer(run_dir: Path) -> None:
    Run(run_dir, last_step=10_000, is_deaf=True)
    with pytest.raises(DataError, match="no checkpoint came within 1 s") as refusal:
        checkpoint_now(run_dir, timeout_seconds=1)
    documented(str(refusal.value))
    assert not (run_dir / REQUEST_FILE).exists()


def test_a_folder_that_cannot_be_written(run_dir: Path) -> None:
    (run_dir / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made") as refusal:
        request_checkpoint(run_dir / "file")
    documented(str(refusal.value))
    assert not checkpoint_path(run_dir, 1).exists()

"""Weights & Biases, for real in its offline mode: what it is given, that a run stays one run, and that its failures end nothing."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spade_t5.checkpoint import list_checkpoints
from spade_t5.testing import documented
from spade_t5.training import wandb_run
from spade_t5.training.engine import Trainer
from spade_t5.training.reporting import read_metrics
from spade_t5.training.wandb_run import WandbConfig, WandbRun

wandb = pytest.importorskip("wandb")

MakeTrainer = Callable[..., Trainer]
OFFLINE = WandbConfig(project="spade-t5-tests", name="a name", mode="offline")
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key of this machine, and no files in its home."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def records(folder: Path) -> list[Any]:
    """What wandb wrote down to be sent, in every start of a run; its own process may still be writing."""
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 60
    while not all(any(record.HasField("exit") for record in records_in(path)) for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [record for path in paths for record in records_in(path)]


def records_in(path: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(path))
    found = []
    while (data := store.scan_data()) is not None:
        found.append(wandb_internal_pb2.Record.FromString(data))
    return found


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    points = []
    for record in records(folder):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if name in items:
            points.append((int(json.loads(items["step"])), json.loads(items[name])))
    return points


def test_a_run_that_goes_on_is_one_run_there(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    run = tmp_path / "run"
    make_trainer(run, steps=2, eval_every_steps=1, wandb=OFFLINE).fit()
    time.sleep(1.1)  # wandb names its files by the second
    trainer = make_trainer(run, steps=3, eval_every_steps=1, wandb=OFFLINE)
    trainer.resume(list_checkpoints(run / "checkpoints")[-1])
    trainer.fit()
    begun = [record.run for record in records(run) if record.HasField("run")]
    assert {it.run_id for it in begun} == {json.loads((run / "wandb.json").read_text())["id"]}
    assert {(it.project, it.display_name) for it in begun} == {("spade-t5-tests", "a name")}
    assert all(not it.host and not it.git.remote_url for it in begun)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    train = [line for line in read_metrics(run) if line["split"] == "train"]
    for name in ("loss", "tokens_per_second"):
        assert curve(run, f"train/{name}") == [(line["step"], pytest.approx(line[name])) for line in train]
    assert [step for step, _ in curve(run, "train/seconds_by/backward")] == [1, 2, 3]
    assert [step for step, _ in curve(run, "validation/loss")] == [1, 2, 3]
    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_the_settings_are_sent(tmp_path: Path) -> None:
    shown = WandbRun(OFFLINE, tmp_path, {"training": {"steps": 3}, "run_dir": "here"})
    shown.close()
    sent = {item.key: item.value_json for record in records(tmp_path) for item in record.run.config.update}
    assert json.loads(sent["training"]) == {"steps": 3}
    assert json.loads(sent["run_dir"]) == "here"


def test_without_a_key_the_run_goes_on_and_nobody_is_asked(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path / "run", steps=1, wandb=WandbConfig(project="p")).fit()
    (message,) = (text for text in caplog.messages if "wandb" in text)
    assert "there is no key" in message
    documented(message)


@pytest.mark.parametrize("fails", ["init", "log", "finish", "import"])
def test_failures_end_nothing(
    fails: str,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise TimeoutError("the server is\naway")

    def work(*_: Any, **__: Any) -> None:
        return None

    calls = {name: fail if name == fails else work for name in ("log", "finish", "define_metric")}
    monkeypatch.setattr(wandb, "init", fail if fails == "init" else lambda **_: SimpleNamespace(**calls))
    if fails == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    make_trainer(tmp_path / "run", steps=3, wandb=OFFLINE).fit()
    assert len([line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]) == 3
    (message,) = (text for text in caplog.messages if "wandb" in text)
    assert ("not installed" if fails == "import" else "wandb: the server is away") in message
    documented(message)


def test_the_end_of_a_run_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.01)
    calls = SimpleNamespace(finish=lambda: time.sleep(1), define_metric=lambda *_, **__: None)
    monkeypatch.setattr(wandb, "init", lambda **_: calls)
    WandbRun(OFFLINE, tmp_path, {}).close()
    documented(caplog.messages[0])

"""Exporting and verifying a run that goes on, deletes what is being read, is killed, or fills the disk."""

import errno
import json
import os
import re
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
from safetensors.torch import load_file

from spade_t5.checkpoint import list_checkpoints, read_weights, verify_folder
from spade_t5.hf import export
from spade_t5.launch.cli import main
from spade_t5.testing import disks, documented
from spade_t5.testing.checkpoints import forge
from spade_t5.testing.ranks import launch_ranks

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command; gives its exit code, what it printed, and the line of the refusal."""

    def say(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        if code == 2:
            documented(printed.err)
        return code, printed.out, printed.err

    return say


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of a run, to damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_verify_goes_over_all_checkpoints_of_a_run(own_run: Path, said: Said) -> None:
    third, sixth = (own_run / "checkpoints" / f"step-0000000{step}" for step in (3, 6))
    code, out, _ = said("verify", own_run)
    assert code == 0
    assert out.splitlines() == [f"{path}: every file matches the manifest" for path in (third, sixth)]
    (third / "frozen.safetensors").unlink()
    (own_run / "checkpoints" / "step-00000009").mkdir()
    code, out, err = said("verify", own_run)
    assert code == 2
    bad, good, empty = out.splitlines()
    assert bad.startswith(f"{third / 'frozen.safetensors'}: missing")
    assert good == f"{sixth}: every file matches the manifest"
    assert empty.startswith(str(own_run / "checkpoints" / "step-00000009"))
    assert "2 of 3 checkpoints are damaged" in err
    assert said("verify", sixth)[0] == 0
    (sixth / "more.bin").touch()
    assert "more.bin" in said("verify", sixth)[2]
    shutil.rmtree(own_run / "checkpoints")
    (own_run / "checkpoints").mkdir()
    assert "holds no checkpoint" in said("verify", own_run)[2]


def test_a_checkpoint_of_another_class_or_with_an_empty_config(own_run: Path, tmp_path: Path, said: Said) -> None:
    newest = own_run / "checkpoints" / "step-00000006"
    forge(newest, {"config": {}})
    assert said("export", own_run, "--out", tmp_path / "model")[0] == 0
    forge(newest, {"model_class": "os.system"})
    assert "model_class: 'os.system' is none of" in said("export", own_run, "--out", tmp_path / "other")[2]


def test_averages(tmp_path: Path, pretrain_words: Callable[..., list[str]], run: Path, said: Said) -> None:
    averaged = tmp_path / "averaged"
    assert main(pretrain_words(averaged, "training.steps=2", "training.ema_decay=0.5")) == 0
    assert said("export", averaged, "--ema", "--out", tmp_path / "ema")[0] == 0
    assert said("export", averaged, "--out", tmp_path / "plain")[0] == 0
    newest = list_checkpoints(averaged / "checkpoints")[-1]
    for name, is_averaged in (("ema", True), ("plain", False)):
        exported = load_file(tmp_path / name / "model.safetensors")
        expected = read_weights(newest, is_averaged=is_averaged)
        assert all(torch.equal(exported[key], expected[key]) for key in exported.keys() & expected.keys())
        assert len(exported.keys() & expected.keys()) > 20
    code, _, err = said("export", run, "--ema", "--out", tmp_path / "none")
    assert code == 2
    assert "holds no averages of the weights" in err
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_the_run_deletes_meanwhile(
    own_run: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = export.load_weights_into

    def delete_and_load(model: Any, path: Path, **options: Any) -> None:
        if path.name == "step-00000006":
            shutil.rmtree(path)
        load(model, path, **options)

    monkeypatch.setattr(export, "load_weights_into", delete_and_load)
    again = Path(shutil.copytree(own_run, tmp_path / "again"))
    assert said("export", own_run, "--out", tmp_path / "model")[0] == 0
    documented(caplog.messages[-1])
    assert "steps: 3;" in (tmp_path / "model" / "README.md").read_text()
    code, _, err = said("export", again, "--step", 6, "--out", tmp_path / "other")
    assert code == 2
    assert "was deleted by the run while it was read" in err
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_not_exported(own_run: Path, tmp_path: Path, said: Said) -> None:
    file = own_run / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    code, _, err = said("export", own_run, "--out", tmp_path / "model")
    assert code == 2
    assert file.name in err
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_only_the_owner_may_write_to_an_export(run: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "model", *(tmp_path / "model").iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path


def die_at(event: str, name: str) -> None:
    """Kills this process at the first such call to the file system for a path that ends so."""

    def watch(found: str, arguments: tuple[Any, ...]) -> None:
        if found == event and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("event", "name"),
    [
        ("open", "/generation_config.json"),
        ("open", "/README.md"),
        ("open", ".partial/manifest.json"),
        ("os.rename", ".partial"),
    ],
)
def test_a_killed_export_leaves_nothing_under_its_name(event: str, name: str, run: Path, tmp_path: Path) -> None:
    words = ["export", str(run), "--out", str(tmp_path / "model")]
    with launch_ranks(
        words, num_ranks=1, log_dir=tmp_path / "logs", hook=die_at, hook_arguments={"event": event, "name": name}
    ) as group:
        assert group.wait() == [-signal.SIGKILL]
    left, logs = sorted(os.listdir(tmp_path))
    assert re.fullmatch(r"\.model\..*\.partial", left)
    assert logs == "logs"
    assert main(words) == 0
    verify_folder(tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["logs", "model"]


def test_two_exports_to_one_folder(run: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first writes: the first is refused, and neither touches what the other makes."""
    load = export.load_tokenizer_of
    codes = []

    def export_meanwhile(checkpoint: Path) -> Any:
        monkeypatch.setattr(export, "load_tokenizer_of", load)
        codes.append(said("export", run, "--out", tmp_path / "model")[0])
        return load(checkpoint)

    monkeypatch.setattr(export, "load_tokenizer_of", export_meanwhile)
    code, _, err = said("export", run, "--out", tmp_path / "model")
    assert (codes, code) == ([0], 2)
    assert "cannot be written (Directory not empty)" in err
    verify_folder(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    with disks.small_disk(tmp_path / "disk", "64k") as path:
        yield path


def test_a_full_disk(run: Path, tiny_disk: Path, said: Said) -> None:
    code, _, err = said("export", run, "--out", tiny_disk / "model")
    assert code == 2
    assert os.strerror(errno.ENOSPC) in err
    assert os.listdir(tiny_disk) == []


def test_a_checkpoint_for_the_asking(tmp_path: Path, pretrain_words: Callable[..., list[str]], said: Said) -> None:
    code, _, err = said("export", tmp_path, "--now", "--out", tmp_path / "model")
    assert code == 2
    assert "no run is going on" in err
    run_dir = tmp_path / "run"
    words = pretrain_words(run_dir, "training.steps=100000", "training.save_every_steps=null")
    with launch_ranks(words, num_ranks=1, log_dir=tmp_path / "logs") as group:
        trained_a_step = threading.Event()
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert group.is_running(), group.stderr(0)
            trained_a_step.wait(0.05)
        assert said("export", run_dir, "--now", "--wait-seconds", 120, "--out", tmp_path / "model")[0] == 0
        assert group.is_running()
        group.kill("all")
        group.wait()
    (path,) = list_checkpoints(run_dir / "checkpoints")
    assert (
        f"steps: {json.loads((path / 'state.json').read_text())['step']:,};"
        in (tmp_path / "model" / "README.md").read_text()
    )
    assert "leave one of them out" in said("export", run_dir, "--now", "--step", 3, "--out", tmp_path / "other")[2]

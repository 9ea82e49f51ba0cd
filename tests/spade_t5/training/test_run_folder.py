"""Where a run goes on, what it may not change, and what is written when."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spade_t5.checkpoint import save_checkpoint
from spade_t5.config import read_yaml
from spade_t5.errors import ConfigError, DataError
from spade_t5.training.backend import SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.run_folder import check_same_settings, find_resume_point, open_run_folder, provenance

CONFIG: dict[str, Any] = {"run_dir": "a", "model": {"preset": "tiny"}, "training": {"seed": 0, "steps": 3}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    backend = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    for step in (1, 2):
        save_checkpoint(tmp_path / "run" / "checkpoints", backend, step=step, facts={"config": CONFIG}, keep=9)
    return tmp_path / "run"


def test_auto_takes_the_newest_checkpoint_that_was_finished(run_dir: Path, tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "new", "auto") is None
    assert find_resume_point(run_dir, "auto") == run_dir / "checkpoints" / "step-00000002"
    (run_dir / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    assert find_resume_point(run_dir, "auto") == run_dir / "checkpoints" / "step-00000001"


def test_a_path_may_be_a_checkpoint_or_another_run(run_dir: Path, tmp_path: Path) -> None:
    first = run_dir / "checkpoints" / "step-00000001"
    assert find_resume_point(tmp_path / "new", str(first)) == first
    assert find_resume_point(tmp_path / "new", str(run_dir)) == run_dir / "checkpoints" / "step-00000002"
    with pytest.raises(ConfigError, match=r"--resume: nowhere is no checkpoint and holds none; give auto, none, or"):
        find_resume_point(run_dir, "nowhere")


def test_none_never_overwrites_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "new", "none") is None
    with pytest.raises(ConfigError, match="already holds checkpoints; use another run_dir, or --resume auto"):
        find_resume_point(run_dir, "none")


def test_the_resolved_config_is_written(tmp_path: Path) -> None:
    open_run_folder(tmp_path / "deep" / "run", CONFIG, None)
    assert read_yaml(tmp_path / "deep" / "run" / "config.yaml") == CONFIG
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run_folder(tmp_path / "file" / "run", CONFIG, None)


@pytest.mark.parametrize("damage", ["state.json", "rank-00000.safetensors"])
def test_nothing_is_written_before_the_checkpoint_is_verified(damage: str, run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    os.truncate(checkpoint / damage, 5)
    with pytest.raises(DataError, match=damage.replace(".", r"\.")):
        open_run_folder(tmp_path / "new", CONFIG, checkpoint)
    assert not (tmp_path / "new").exists()


def test_fixed_settings_are_refused_with_old_and_new_value_and_others_announced(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {**CONFIG, "run_dir": "b", "training": {"seed": 0, "steps": 9}}
    with caplog.at_level(logging.INFO, "spade_t5"):
        open_run_folder(run_dir, changed, run_dir / "checkpoints" / "step-00000001")
    assert caplog.messages == ["training.steps: was 3 in the checkpoint, is 9 now"]
    before = (run_dir / "config.yaml").read_bytes()
    changed["training"] = {"seed": 5, "steps": 9}
    with pytest.raises(ConfigError, match=r"training\.seed: was 0 in the checkpoint, is 5 now; a resumed run cannot"):
        open_run_folder(run_dir, changed, run_dir / "checkpoints" / "step-00000001")
    assert (run_dir / "config.yaml").read_bytes() == before


def test_a_fixed_key_stands_for_all_below_it_and_not_for_its_namesakes() -> None:
    old = {"model": {"d_ff": 4}, "model_note": "a"}
    check_same_settings(old, {"model": {"d_ff": 4}, "model_note": "b"}, ["model"])
    with pytest.raises(ConfigError, match=r"model\.d_ff: was 4 in the checkpoint, is None now"):
        check_same_settings(old, {"model": {}, "model_note": "a"}, ["model"])


def test_provenance_names_torch_and_needs_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance() == {"torch": torch.__version__, "git_revision": None}

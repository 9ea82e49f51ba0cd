"""Where a run goes on, what is checked before it begins, and what is written when."""

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from spade_t5.checkpoint import save_checkpoint
from spade_t5.config import read_yaml
from spade_t5.errors import ConfigError, DataError
from spade_t5.testing import documented
from spade_t5.training.backend import SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.provenance import provenance
from spade_t5.training.run_folder import Resume, find_resume_point, open_run_folder

CONFIG: dict[str, Any] = {
    "run_dir": "a",
    "model": {"preset": "tiny"},
    "training": {"seed": 0, "steps": 3, "clip_norm": 1.0, "schedule": {"name": "constant"}},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    backend = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    facts = {"config": CONFIG, "provenance": provenance()}
    for step in (1, 2):
        save_checkpoint(tmp_path / "run" / "checkpoints", backend, step=step, facts=facts, keep=9)
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def begin(run_dir: Path, config: dict[str, Any] = CONFIG, resume: Resume = Resume()) -> None:  # noqa: B008
    with open_run_folder(run_dir, resume) as folder:
        folder.check_settings(config)
        folder.begin(config)


def refused(run_dir: Path, resume: Resume = Resume(), config: dict[str, Any] = CONFIG) -> str:  # noqa: B008
    """What a run is refused with; the folder stays as it was."""
    before = contents(run_dir.parent)
    with pytest.raises((ConfigError, DataError)) as caught:
        begin(run_dir, config, resume)
    assert contents(run_dir.parent) == before
    message = str(caught.value)
    assert "\n" not in message
    documented(message)
    return message


def test_auto_starts_anew_in_a_new_folder_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spade_t5"):
        assert find_resume_point(tmp_path, "auto") is None
    assert f"no checkpoint in {tmp_path / 'checkpoints'}: starting at step 0" in caplog.messages


def test_a_path_may_be_a_checkpoint_or_another_run(run_dir: Path, tmp_path: Path) -> None:
    first = run_dir / "checkpoints" / "step-00000001"
    assert find_resume_point(tmp_path / "new", str(first)) == first
    assert find_resume_point(tmp_path / "new", str(run_dir)) == run_dir / "checkpoints" / "step-00000002"
    assert find_resume_point(tmp_path / "new", f"{run_dir}/../run/checkpoints/../") == Path(
        f"{run_dir}/../run/checkpoints/../checkpoints/step-00000002"
    )


@pytest.mark.parametrize("point", ["nowhere", "../../etc", "/", "a\nb", "~", "step-00000002", ""])
def test_a_resume_point_that_is_none(point: str, run_dir: Path) -> None:
    message = refused(run_dir, Resume(point=point))
    assert "is no checkpoint and holds none; give auto, none, or the path of a checkpoint or run folder" in message


def test_none_never_overwrites_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "new", "none") is None
    assert "already holds checkpoints; use another run_dir, or --resume auto" in refused(run_dir, Resume(point="none"))


def test_the_resolved_config_is_written(tmp_path: Path) -> None:
    begin(tmp_path / "deep" / "run")
    assert read_yaml(tmp_path / "deep" / "run" / "config.yaml") == CONFIG
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == {"config.yaml", "checkpoints", "logs"}

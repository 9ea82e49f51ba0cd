"""Recorded steps: which, by whom, and that they compute the same."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint import list_checkpoints
from spade_t5.testing import documented
from spade_t5.testing.runs import assert_exact
from spade_t5.training.engine import Trainer
from spade_t5.training.profiling import ProfileConfig, StepProfiler
from spade_t5.training.reporting import read_metrics

MakeTrainer = Callable[..., Trainer]


def recorded_steps(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return sorted({event["name"] for event in events if str(event.get("name", "")).startswith("step ")})


def test_recorded_steps_compute_the_same(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(tmp_path / "plain").fit()
    make_trainer(tmp_path / "run", profile=ProfileConfig(first_step=2, num_steps=2)).fit()
    assert_exact(tmp_path / "run", tmp_path / "plain")
    (path,) = (tmp_path / "run" / "profile").iterdir()
    assert path.name == "steps-2-3.rank-00000.trace.json.gz"
    assert recorded_steps(path) == ["step 2", "step 3"]


def test_a_run_that_goes_on_within_the_recorded_steps_records_the_rest(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    profile = ProfileConfig(first_step=2, num_steps=3)
    make_trainer(tmp_path / "run", steps=3, profile=profile).fit()  # ends within them too
    trainer = make_trainer(tmp_path / "run", steps=6, profile=profile)
    trainer.resume(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    trainer.fit()
    paths = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name.partition(".")[0] for path in paths] == ["steps-2-3", "steps-4-4"]
    assert recorded_steps(paths[1]) == ["step 4"]


def test_other_ranks_and_steps_are_not_recorded(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(tmp_path / "ranks", steps=2, profile=ProfileConfig(first_step=1, ranks=(1, 3))).fit()
    make_trainer(tmp_path / "steps", steps=2, profile=ProfileConfig(first_step=9)).fit()
    assert not list(tmp_path.glob("*/profile"))


def test_a_trace_is_written_outside_of_steps(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a host that stands still while nothing is written, and jumps while a trace is."""
    trainer = make_trainer(tmp_path / "run", profile=ProfileConfig(first_step=2, num_steps=2))
    watched: list[str] = []
    write, offset = StepProfiler._write, 0.0

    def slow(*arguments: Any) -> None:
        nonlocal offset
        assert trainer._watchdog is not None
        watched.append(trainer._watchdog._position.phase)
        write(*arguments)
        offset += 1000.0

    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + offset)
    monkeypatch.setattr(StepProfiler, "_write", slow)
    trainer.fit()
    assert watched == ["save"]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if line["split"] == "train"}
    assert [line["seconds_by"]["profile"] >= 1000 for line in lines.values()] == [False, False, False, True]
    assert all(line["seconds"] < 1000 for line in lines.values())


def test_what_was_recorded_before_a_rollback_is_written_at_once(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(first_step=3, num_steps=4, ranks=(1,)), tmp_path)
    due = [[step for step in range(9) if profiler.is_due(step, is_going_back=back)] for back in (False, True)]
    assert due == [[6], [3, 4, 5, 6]]
    assert not StepProfiler(None, tmp_path).is_due(1, is_going_back=True)


def test_a_profile_without_a_place_is_left_out(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("")
    make_trainer(run_dir, steps=2, profile=ProfileConfig(first_step=1, num_steps=1)).fit()
    said = [record.getMessage() for record in caplog.records]
    (message,) = (line for line in said if "there is no profile" in line)
    documented(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_step": 0}, "first_step: 0 must be at least 1"),
        ({"first_step": 3, "num_steps": 0}, "num_steps: 0 must be at least 1"),
        ({"first_step": 3, "ranks": (0, -1)}, r"ranks: \[0, -1\] must be numbers from 0"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(**fields)  # type: ignore[arg-type]

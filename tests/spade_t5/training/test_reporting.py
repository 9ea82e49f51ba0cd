"""What a run writes while it goes."""

import json
import logging
import re
from pathlib import Path

import pytest

from spade_t5.testing import documented
from spade_t5.training.plots import draw_plots
from spade_t5.training.reporting import METRICS_FILE, Reporter, read_lines, read_metrics


def test_losses_of_groups_reach_metrics_and_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = {
        "step": 7,
        "split": "validation",
        "loss": 2.5,
        "targets": 40,
        "loss_by": {"denoiser": {"span d0.15 m3": 2.0, "lm": 3.0}, "length": {"1-64": 2.5}},
    }
    with Reporter(tmp_path, first_step=1, num_steps=9, log_every_steps=5) as reporter:
        reporter.evaluation(metrics)
    assert read_metrics(tmp_path) == [json.loads(json.dumps(metrics))]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "validation/loss": [(7, 2.5)],
        "validation/targets": [(7, 40.0)],
        "validation/loss_by/denoiser/span d0.15 m3": [(7, 2.0)],
        "validation/loss_by/denoiser/lm": [(7, 3.0)],
        "validation/loss_by/length/1-64": [(7, 2.5)],
    }


def step_metrics(step: int) -> dict[str, object]:
    return {"step": step, "split": "train", "loss": 2.0, "lr": 0.1, "tokens_per_second": 5.0}


def test_the_time_left_counts_steps_of_this_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also behind a rollback to a step before the one that this attempt began with."""
    caplog.set_level(logging.INFO, "spade_t5")
    with Reporter(tmp_path, first_step=5, num_steps=9, log_every_steps=1) as reporter:
        reporter.train_step(step_metrics(5))
        for step in (2, 3, 4, 5):
            reporter.resumed(step - 1)
            reporter.train_step(step_metrics(step))
    told = [message for message in caplog.messages if "ETA" in message]
    assert len(told) == 5
    assert all(re.search(r"ETA 0:00:\d\d$", message) for message in told)


def test_the_log_tells_speed_and_the_slowest_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spade_t5")
    own = {"min": 0.5, "median": 0.5, "max": 0.75}
    ranks = {"seconds": own, "own_seconds": own, "slowest_rank": 3, "slowest_host": "node-2"}
    with Reporter(tmp_path, first_step=1, num_steps=9, log_every_steps=1) as reporter:
        reporter.train_step({**step_metrics(1), "mfu": 0.4123, "ranks": ranks})
        reporter.train_step({**step_metrics(2), "mfu": None})
    first, second = caplog.messages
    assert "loss 2.0000, 5 tokens/s, MFU 41.2%, slowest rank 3 (node-2): 0.75 s of its own work in a step" in first
    assert "MFU" not in second


@pytest.mark.parametrize(("first_step", "steps"), [(1, []), (4, [3])])
def test_a_run_from_elsewhere_says_where_it_goes_on(first_step: int, steps: list[int], tmp_path: Path) -> None:
    with Reporter(tmp_path, first_step=first_step, num_steps=9, log_every_steps=5):
        pass
    events = read_lines(tmp_path / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [("resume", step) for step in steps]
    assert read_metrics(tmp_path) == []


def test_lines_that_a_power_cut_broke_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = [json.dumps(step_metrics(step)) for step in (1, 2, 3)]
    lines = [whole[0], "\0" * 512, "17", whole[1], '{"step": 7, "\xff', whole[2], '{"step": 8']
    (tmp_path / METRICS_FILE).write_bytes("\n".join(lines).encode("latin-1"))
    assert [metrics["step"] for metrics in read_metrics(tmp_path)] == [1, 2, 3]
    (message,) = caplog.messages
    assert "3 of 6 lines" in message
    documented(message)
    assert len(draw_plots(tmp_path)) == 2

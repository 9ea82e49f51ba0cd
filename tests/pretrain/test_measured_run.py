"""A pretraining run of a real model measures itself: where its time goes, how many operations it takes, and that every figure is explained."""

import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spade_t5.config import from_mapping
from spade_t5.pretrain.run import PretrainConfig, pretrain
from spade_t5.training import engine
from spade_t5.training.reporting import Reporter, read_lines, read_metrics

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
PEAK_TFLOPS = 0.5
WARMUP_STEPS = 2
"""In which the loader's process starts and fills its queue."""


@pytest.fixture(scope="module")
def stopwatch() -> dict[str, float]:
    """When training began and when it said what it had taken, by another clock than the engine's."""
    return {}


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory, stopwatch: dict[str, float]) -> Path:
    """Ten steps of mini, with a process that prepares its rows."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    config = {
        "run_dir": str(run_dir),
        "model": {"preset": "mini"},
        "data": {"store": str(store_folder), "max_eval_rows": 4, "packing": "best_fit"},
        "objective": {"inputs_length": 256},
        "training": {
            "steps": 10,
            "global_batch_rows": 8,
            "micro_batch_rows": 4,
            "loader_workers": 1,
            "save_every_steps": 5,
            "norms_every_steps": 5,
            "log_every_steps": 1,
            "peak_tflops": PEAK_TFLOPS,
        },
    }

    def begin(trainer: engine.Trainer, original: Any = engine.Trainer._check_free_space) -> None:
        original(trainer)
        stopwatch["began"] = time.monotonic()

    def event(reporter: Reporter, values: dict[str, Any], original: Any = Reporter.event) -> None:
        if values["event"] == "time":
            stopwatch["ended"] = time.monotonic()
        original(reporter, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_check_free_space", begin)
        patch.setattr(Reporter, "event", event)
        pretrain(from_mapping(PretrainConfig, config))
    return run_dir


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["split"] == "train"]


def test_the_wait_for_data_is_below_two_per_cent(run: Path) -> None:
    """In the middle of the steps: another program may take the processor from one of them."""
    share = statistics.median(line["seconds_by"]["data"] / line["seconds"] for line in steps_of(run)[WARMUP_STEPS:])
    print(f"waiting for data: {share:.2%} of the time of a step")
    assert share < 0.02


def test_the_parts_sum_to_the_time_on_the_wall(run: Path, stopwatch: dict[str, float]) -> None:
    (event,) = (event for event in read_lines(run / "events.jsonl") if event["event"] == "time")
    wall = stopwatch["ended"] - stopwatch["began"]
    print(f"the parts sum to {sum(event['seconds_by'].values()) / wall:.2%} of the time on the wall")
    assert sum(event["seconds_by"].values()) == pytest.approx(wall, rel=0.02)
    assert event["seconds"] == pytest.approx(wall, rel=0.02)


def test_most_of_a_step_is_forward_and_backward(run: Path) -> None:
    for line in steps_of(run)[WARMUP_STEPS:]:
        parts = line["seconds_by"]
        assert parts["forward"] + parts["backward"] > 0.5 * line["seconds"]
        assert parts["communication"] == 0  # of one process


def test_operations_and_their_share_of_the_peak(run: Path) -> None:
    for line in steps_of(run):
        assert 0 < line["model_flops_per_second"] < line["executed_flops_per_second"]
        assert line["mfu"] == pytest.approx(line["model_flops_per_second"] / (PEAK_TFLOPS * 1e12))
        assert line["hfu"] == pytest.approx(line["executed_flops_per_second"] / (PEAK_TFLOPS * 1e12))
        assert line["tokens_per_second"] <= line["padded_tokens_per_second"]
        assert line["padded_tokens_per_second"] * line["seconds"] == pytest.approx(8 * 256)
        # Six operations for each weight and token (three products of two), less what tokens of one side alone pass, plus attention.
        per_token = line["model_flops_per_second"] / (line["tokens_per_second"] + line["targets_per_second"])
        assert 1e6 < per_token < 6 * 15.5e6


def test_norms_come_as_often_as_asked_for(run: Path) -> None:
    lines = [line for line in steps_of(run) if "grad_norm_by" in line]
    assert [line["step"] for line in lines] == [5, 10]
    for line in lines:
        whole = math.sqrt(sum(norm**2 for norm in line["grad_norm_by"].values()))
        assert whole == pytest.approx(line["grad_norm"], rel=1e-6)


def names_in(line: Mapping[str, Any]) -> Iterator[str]:
    """Names of fields, and of the parts of what has fixed ones."""
    yield from line
    for name in ("seconds_by", "memory", "grad_norm_by"):
        yield from line.get(name, {})


def test_every_field_is_documented(run: Path) -> None:
    documented = set(re.findall(r"`([\w]+)`", DOCS.read_text(encoding="utf-8")))
    missing = {name for line in read_metrics(run) for name in names_in(line)} - documented
    assert not missing
    assert (run / "plots" / "throughput.png").read_bytes().startswith(b"\x89PNG")

"""What a run measures of itself: norms by part, rates, memory, and which rank is slow."""

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.anatomy import part_of
from spade_t5.hf.loading import build_model
from spade_t5.testing import call_on_ranks, documented
from spade_t5.training import distributed
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import Batch, NumberedRows
from spade_t5.training.engine import Trainer, start
from spade_t5.training.objectives import Seq2SeqObjective
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.reporting import read_lines, read_metrics
from spade_t5.training.stragglers import SlowRanks
from spade_t5.training.throughput import Work, rates, work_of
from spade_t5.training.timing import OUTSIDE_STEPS, PARTS

DOCS = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
STEPS = 3
SIZE = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 1}
SHARDINGS = ["0-fp32", "1-fp32", "2-fp32", "3-fp32", "1-bf16", "2-bf16", "3-bf16"]
ROW_SECONDS = 0.1
ROWS_OF_RANK = 3


class SlowRows(NumberedRows):
    """Rows of random tokens, which rank 1 may take its time to read."""

    def __init__(self, *, is_slow: bool) -> None:
        self.seconds = ROW_SECONDS * is_slow * distributed.rank()

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        time.sleep(self.seconds)
        draws = [torch.Generator().manual_seed(abs(number)) for number in row_numbers]
        rows = torch.stack([torch.randint(2, 50, (18,), generator=draw) for draw in draws])
        return {"input_ids": rows[:, :12], "labels": rows[:, 12:]}


def train(run_dir: Path, stage: int | None, precision: str) -> None:
    """Three steps of six rows, one row at a time, in which gradients are clipped."""
    zero = None if stage is None else DeepSpeedConfig(zero_stage=stage, persistence_threshold_numel=50)  # type: ignore[arg-type]
    config = TrainingConfig(
        steps=STEPS,
        global_batch_rows=2 * ROWS_OF_RANK,
        micro_batch_rows=1,
        optimizer=AdamWConfig(learning_rate=1e-2),
        clip_norm=0.5,
        precision=precision,  # type: ignore[arg-type]
        deepspeed=zero,
        log_every_steps=1,
        norms_every_steps=1,
    )
    start(config)
    run_dir.mkdir(exist_ok=True)
    model_config = SpadeT5Config.from_preset("tiny", vocab_size=50, tie_word_embeddings=False, **SIZE)
    Trainer(
        model=build_model(SpadeT5ForConditionalGeneration, model_config, seed=0),
        objective=Seq2SeqObjective(),
        train_rows=SlowRows(is_slow=precision == "fp32"),
        eval_rows=None,
        config=config,
        run_dir=run_dir,
        facts={},
        part_of=part_of,
    ).fit()


def train_with_every_sharding(folder: str) -> None:
    for name in SHARDINGS:
        stage, precision = name.split("-")
        train(Path(folder) / name, int(stage), precision)
    distributed.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks in folders named after stage and precision, and `alone`, of one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("runs")
    call_on_ranks(train_with_every_sharding, {"folder": str(folder)}, num_ranks=2, log_dir=folder / "ranks")
    train(folder / "alone", None, "fp32")
    return folder


def root_of_squares(norms: dict[str, float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms.values()))


@pytest.mark.parametrize("name", SHARDINGS)
def test_norms_of_the_parts_make_up_the_whole_and_do_not_depend_on_the_sharding(name: str, runs: Path) -> None:
    metrics, expected = read_metrics(runs / name), read_metrics(runs / "alone")
    assert len(metrics) == STEPS
    tolerance = 1e-5 if name.endswith("fp32") else 0.03
    for line, other in zip(metrics, expected, strict=True):
        assert root_of_squares(line["grad_norm_by"]) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert set(line["grad_norm_by"]) == {
            "embedding", "encoder_attention", "encoder_position_bias", "encoder_feed_forward", "fusion", "norms",
            "decoder_attention", "decoder_position_bias", "cross_attention", "decoder_feed_forward", "head",
        }  # fmt: skip
        for kind in ("grad_norm_by", "weight_norm_by"):
            assert line[kind] == pytest.approx(other[kind], rel=tolerance, abs=1e-6 if kind == "grad_norm_by" else 0)


def test_norms_of_the_weights_are_those_that_the_gradient_was_taken_at(runs: Path) -> None:
    config = SpadeT5Config.from_preset("tiny", vocab_size=50, tie_word_embeddings=False, **SIZE)
    squares: dict[str, float] = {}
    for name, p in build_model(SpadeT5ForConditionalGeneration, config, seed=0).named_parameters():
        if p.requires_grad:
            squares[part_of(name)] = squares.get(part_of(name), 0.0) + float(p.detach().double().square().sum())
    expected = {part: math.sqrt(value) for part, value in squares.items()}
    assert read_metrics(runs / "alone")[0]["weight_norm_by"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in SHARDINGS if name.endswith("fp32")])
def test_the_slow_rank_is_named_though_all_wait_for_it(name: str, runs: Path) -> None:
    # Sums of steps, and times of one run beside each other: a busy machine may hold up any rank for a while.
    lines = read_metrics(runs / name)[1:]
    own, whole = ([line["ranks"][key] for line in lines] for key in ("own_seconds", "seconds"))
    own_difference, difference = (sum(ranks["max"] - ranks["min"] for ranks in steps) for steps in (own, whole))
    assert own_difference > 2 * difference
    ranks = max((line["ranks"] for line in lines), key=lambda ranks: ranks["own_seconds"]["max"])
    assert ranks["slowest_rank"] == 1
    # the main rank waits for the other one, which sleeps that long in each step
    assert sum(line["seconds_by"]["communication"] for line in lines) > own_difference / 2
    assert "ranks" not in read_metrics(runs / "alone")[0]
    documented_names = set(re.findall(r"`(\w+)`", DOCS.read_text(encoding="utf-8")))
    assert {*ranks, *ranks["own_seconds"], "ranks"} <= documented_names


@pytest.mark.parametrize("name", ["alone", *SHARDINGS])
def test_the_parts_of_the_time_sum_to_the_whole(name: str, runs: Path) -> None:
    lines = read_metrics(runs / name)
    for line in lines:
        assert list(line["seconds_by"]) == list(PARTS)
        between = sum(line["seconds_by"][part] for part in OUTSIDE_STEPS)
        assert line["seconds"] == pytest.approx(sum(line["seconds_by"].values()) - between)
    (event,) = (event for event in read_lines(runs / name / "events.jsonl") if event["event"] == "time")
    assert event["seconds"] == pytest.approx(sum(event["seconds_by"].values()))
    for part in PARTS:
        assert event["seconds_by"][part] >= sum(line["seconds_by"][part] for line in lines) * (1 - 1e-9)
    assert event["seconds_by"]["checkpoint"] > 0


class Flops(NamedTuple):
    model: float
    executed: float


def test_rates_of_a_step() -> None:
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "segment_ids": torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0]]),
        "labels": torch.tensor([[5, 6, -100], [7, -100, -100]]),
    }
    objective = Seq2SeqObjective()
    work = work_of([batch, batch], objective.num_targets, lambda _: Flops(3e12, 5e12))
    assert work == Work(6, 8, 16, 12, 6e12, 1e13)
    found = rates(work, 2.0, 4, 2e12)
    assert found == {
        "tokens_per_second": 4.0,
        "targets_per_second": 3.0,
        "padded_tokens_per_second": 8.0,
        "padded_targets_per_second": 6.0,
        "model_flops_per_second": 7.5e11,
        "executed_flops_per_second": 1.25e12,
        "mfu": 0.375,
        "hfu": 0.625,
    }
    assert rates(work, 2.0, 4, None)["mfu"] is None
    uncounted = rates(work_of([batch], objective.num_targets, None), 2.0, 4, 2e12)
    assert [uncounted[name] for name in ("model_flops_per_second", "mfu", "hfu")] == [None] * 3


def test_a_slow_rank_is_told_of_once_until_it_has_recovered(caplog: pytest.LogCaptureFixture) -> None:
    ranks = SlowRanks(["node-1", "node-1", "node-2", "node-2"])
    fine, slow = [1.0, 1.1, 1.2, 1.0], [1.0, 1.1, 1.2, 1.8]
    for step, seconds in enumerate([slow, slow, fine, slow, slow, slow, slow, fine, fine], start=1):
        ranks.look_at(step, seconds)
    (message,) = caplog.messages
    documented(message)
    assert message.startswith("step 6: rank 3 (node-2) keeps the others waiting: it works for 1.8 s in a step")
    for step in (10, 11, 12):
        ranks.look_at(step, slow)
    assert len(caplog.messages) == 2

"""What ranks are said to exchange in a step, against the calls that real ranks make."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.hf.loading import build_model
from spade_t5.testing import call_on_ranks
from spade_t5.testing.collectives import recorded_collectives
from spade_t5.training import communication, deepspeed
from spade_t5.training.communication import describe, step_traffic
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import Batch, NumberedRows
from spade_t5.training.engine import Trainer
from spade_t5.training.objectives import Seq2SeqObjective
from spade_t5.training.optimizers import AdamWConfig

NUM_STEPS, MEASURED_STEP = 4, 3
"""ZeRO 3 records the order of modules in the second pass, and keeps to it from the third on."""
CASES = [
    {"zero_stage": stage, "precision": precision, "micro_batches": micro_batches}
    # DeepSpeed's autocast, once used, stays switched on in a process.
    for precision in ("fp32", "bf16", "bf16_autocast")
    for stage in (0, 1, 2, 3)
    for micro_batches in (1, 3)
    if (stage, precision) != (0, "bf16")
]


SMALL_LIMITS = [
    {"zero_stage": 1, "bucket_numel": 1600},
    {"zero_stage": 2, "bucket_numel": 1600},
    {"zero_stage": 3, "bucket_numel": 1600},
    {"zero_stage": 3, "persistence_threshold_numel": 100_000},
]
# At which a model of 13,000 elements behaves as one of some 10^9 does with DeepSpeed's own: some weights are gathered twice in a micro-batch.
REGATHERING_LIMITS = [
    {"zero_stage": 3, "live": 1_000_000, "reuse": 2000, "prefetch": 500},
    {"zero_stage": 3, "live": 2000, "reuse": 2000, "prefetch": 500},
    {"zero_stage": 3, "live": 4000, "reuse": 1_000_000, "prefetch": 500},
    {"zero_stage": 3, "live": 8000, "reuse": 6000, "prefetch": 50},
]


# Two nodes of two ranks each.
HIERARCHICAL = [
    {"zero_stage": 3, "hpz_partition_size": 2, "precision": precision, "micro_batches": micro_batches}
    for precision in ("fp32", "bf16")
    for micro_batches in (1, 3)
]


class Rows(NumberedRows):
    """Equal rows."""

    def collate(self, row_numbers: Any) -> Batch:
        ids = torch.full((len(row_numbers), 8), 7)
        return {"input_ids": ids, "labels": ids[:, :4].clone()}


def small_model() -> SpadeT5ForConditionalGeneration:
    """Two layers each; its numbers of elements are not multiples of the number of ranks."""
    config = SpadeT5Config.from_preset(
        "tiny", vocab_size=51, d_model=18, d_ff=23, d_kv=9, num_heads=2, num_layers=2, num_decoder_layers=2
    )
    return build_model(SpadeT5ForConditionalGeneration, config, seed=0)


def settings(case: dict[str, Any], world_size: int) -> TrainingConfig:
    """Settings of a case."""
    return TrainingConfig(
        steps=NUM_STEPS,
        global_batch_rows=world_size * case.get("micro_batches", 1),
        micro_batch_rows=1,
        optimizer=AdamWConfig(learning_rate=1e-3),
        precision=case.get("precision", "fp32"),
        deepspeed=DeepSpeedConfig(
            zero_stage=case["zero_stage"],
            bucket_numel=case.get("bucket_numel", 200_000_000),
            persistence_threshold_numel=case.get("persistence_threshold_numel", 100),
            hpz_partition_size=case.get("hpz_partition_size", 1),
        ),
    )


def calls_of_a_step(cases: list[dict[str, Any]], folder: str) -> list[list[tuple[str, int, int]]]:
    """Runs on each rank: the collectives of one step of every case."""
    world_size = int(os.environ["WORLD_SIZE"])
    original = deepspeed.deepspeed_json
    results = []
    with recorded_collectives() as calls:
        for number, case in enumerate(cases):
            run_dir = Path(folder) / str(number)
            run_dir.mkdir(exist_ok=True)
            deepspeed.deepspeed_json = partial(limited_json, original, case)
            trainer = Trainer(
                model=small_model(),
                objective=Seq2SeqObjective(),
                train_rows=Rows(),
                eval_rows=None,
                config=settings(case, world_size),
                run_dir=run_dir,
                facts={},
            )
            begins: list[int] = []
            agree = trainer._agree

            def noted(micro_batches: list[Batch], begins: list[int] = begins, agree: Any = agree) -> Any:
                begins.append(len(calls))
                return agree(micro_batches)

            trainer._agree = noted  # type: ignore[method-assign]
            trainer.fit()
            results.append([tuple(call) for call in calls[begins[MEASURED_STEP - 1] : begins[MEASURED_STEP]]])
    return results


def limited_json(original: Any, case: dict[str, Any], *arguments: Any) -> dict[str, Any]:
    """DeepSpeed's configuration with limits of ZeRO 3 that ours leaves at their defaults."""
    result = original(*arguments)
    if "reuse" in case:
        result["zero_optimization"] |= {
            "stage3_max_live_parameters": case["live"],
            "stage3_max_reuse_distance": case["reuse"],
            "stage3_prefetch_bucket_size": case["prefetch"],
        }
    return result


Totals = dict[tuple[str, int], tuple[int, int]]
"""Kind and size of the group to calls and bytes."""


def expected_totals(case: dict[str, Any], world_size: int) -> Totals:
    """What is said to be exchanged."""
    config = settings(case, world_size)
    assert config.deepspeed is not None
    calls, nbytes = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for one in step_traffic(describe(small_model()), config, config.deepspeed, world_size=world_size):
        calls[one.kind, one.num_ranks] += one.calls
        nbytes[one.kind, one.num_ranks] += one.nbytes
    return {key: (calls[key], nbytes[key]) for key in calls}


def measured_totals(cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[Totals]:
    """What is exchanged; the same on all ranks."""
    by_rank = call_on_ranks(
        calls_of_a_step, {"cases": cases, "folder": str(folder)}, num_ranks=world_size, log_dir=folder / "logs"
    )
    assert all(calls == by_rank[0] for calls in by_rank)
    results = []
    for case_calls in by_rank[0]:
        totals: Totals = {}
        for kind, nbytes, num_ranks in case_calls:
            count, total = totals.get((kind, num_ranks), (0, 0))
            totals[kind, num_ranks] = (count + 1, total + nbytes)
        results.append(totals)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_precision_and_accumulation(world_size: int, tmp_path: Path) -> None:
    cases = CASES if world_size == 2 else [*(case for case in CASES if case["micro_batches"] > 1), *HIERARCHICAL]
    for case, measured in zip(cases, measured_totals(cases, world_size, tmp_path), strict=True):
        assert expected_totals(case, world_size) == measured, case


def test_small_buckets_and_other_thresholds(tmp_path: Path) -> None:
    for case, measured in zip(SMALL_LIMITS, measured_totals(SMALL_LIMITS, 2, tmp_path), strict=True):
        assert expected_totals(case, 2) == measured, case


def test_weights_that_zero_3_gathers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the embedding, which is used three times in a pass and counted at one place."""
    embedding_bytes = 51 * 18 * 4
    once = expected_totals({"zero_stage": 3}, 2)["all_gather", 2][1]
    gathered = []
    for case, measured in zip(REGATHERING_LIMITS, measured_totals(REGATHERING_LIMITS, 2, tmp_path), strict=True):
        for name in ("live", "reuse", "prefetch"):
            monkeypatch.setattr(communication, f"_{name.upper()}_NUMEL", case[name])
        communication._gathers.cache_clear()
        expected = expected_totals(case, 2)
        assert measured["reduce_scatter", 2] == expected["reduce_scatter", 2]
        assert measured["all_gather", 2][1] - expected["all_gather", 2][1] in (0, embedding_bytes), case
        assert abs(measured["all_gather", 2][0] - expected["all_gather", 2][0]) <= 2, case
        gathered.append(measured["all_gather", 2][1])
    communication._gathers.cache_clear()
    assert min(gathered) == once
    assert max(gathered) > 1.9 * once


def test_one_rank_exchanges_nothing() -> None:
    config = settings({"zero_stage": 2}, 1)
    assert config.deepspeed is not None
    assert step_traffic(describe(small_model()), config, config.deepspeed, world_size=1) == []


def test_a_model_above_half_the_reuse_distance_gathers_some_weights_twice() -> None:
    """`xl` under ZeRO 3 in bf16: what is used within 10^9 elements is kept for the backward pass, the rest is gathered again."""
    config = TrainingConfig(
        steps=1,
        global_batch_rows=64,
        micro_batch_rows=1,
        optimizer=AdamWConfig(learning_rate=1e-3),
        precision="bf16",
        deepspeed=DeepSpeedConfig(zero_stage=3),
    )
    gathered = {}
    for preset in ("base", "xl"):
        with torch.device("meta"):
            model = describe(SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset(preset)))
        assert config.deepspeed is not None
        traffic = step_traffic(model, config, config.deepspeed, world_size=64)
        whole = sum(one.nbytes for one in traffic if one.kind == "reduce_scatter")
        gathered[preset] = sum(one.nbytes for one in traffic if one.purpose == "weights") / whole
    assert gathered["base"] == pytest.approx(1, abs=0.05)
    assert 1.5 < gathered["xl"] < 2

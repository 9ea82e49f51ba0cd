"""Bytes of every kind against the tensors that are alive on two ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.config import from_mapping
from spade_t5.memory.parameters import Parameters
from spade_t5.memory.states import RankStates, largest_rank, rank_states
from spade_t5.testing.live_storages import SMALL_BYTES, measure, model_fields
from spade_t5.testing.ranks import call_on_ranks
from spade_t5.training.config import TrainingConfig

RESIDENT = ("weights", "frozen", "master", "moments", "average", "persistent", "secondary")


def case(stage: int, precision: str, *, accumulation: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "steps": 9,
        "global_batch_rows": 2 * accumulation,
        "micro_batch_rows": 1,
        "precision": precision,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "deepspeed": {"zero_stage": stage, "bucket_numel": 50_000, "persistence_threshold_numel": 1000},
        **fields,
    }


CASES = [
    case(0, "fp32", ema_decay=0.9),
    case(0, "bf16_autocast", optimizer={"name": "adafactor"}),
    case(1, "fp32", accumulation=2),
    case(1, "bf16_autocast", optimizer={"name": "sgd", "learning_rate": 0.1}),
    case(1, "bf16", ema_decay=0.9),
    case(2, "fp32", ema_decay=0.9),
    case(2, "bf16_autocast", accumulation=2),
    case(2, "bf16", accumulation=2),
    case(3, "fp32", accumulation=2, ema_decay=0.9),
    case(3, "bf16_autocast"),
    case(3, "bf16"),
]


def planned(config: TrainingConfig, rank: int) -> RankStates:
    return rank_states(config, parameters(config.precision), world_size=2, rank=rank)


def parameters(precision: str) -> Parameters:
    with torch.device("meta"):
        model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", **model_fields(precision)))
    return Parameters.of(model)


def test_what_is_planned_is_what_is_alive(tmp_path: Path) -> None:
    measured = call_on_ranks(measure, {"cases": CASES}, num_ranks=2, log_dir=tmp_path / "logs")
    for i, mapping in enumerate(CASES):
        config = from_mapping(TrainingConfig, mapping)
        for rank in range(2):
            states, found = planned(config, rank), measured[rank][i]
            where = (mapping["deepspeed"]["zero_stage"], config.precision, rank)
            for moment, sizes in found.items():
                for name in RESIDENT:
                    assert sizes.get(name, 0) == getattr(states, name), (where, moment, name)
            behind = found["backward"]
            is_first_in_bf16 = where[:2] == (1, "bf16")
            # Only there gradients on their way to float32 outlast the backward pass.
            assert behind["gradients"] == states.gradients + (states.accumulated if is_first_in_bf16 else 0), where
            assert found["step"]["unknown"] < SMALL_BYTES, (where, found)
            assert behind["unknown"] < SMALL_BYTES, (where, found)
            reduction = found["reduction"]
            assert reduction["buckets"] == states.buckets, where
            # Stage 1 reduces behind the backward pass, when activations are gone and those of the piece are copied besides.
            copied = states.gradients if where[0] == 1 else 0
            most = states.gradients + states.accumulated + copied + LARGEST_GRADIENT
            assert reduction["gradients"] <= most, where
            if where[0] == 3:
                assert found["forward"]["gathered"] == states.gathered, where


LARGEST_GRADIENT = 4 * 128 * 256
"""Bytes of one that is not yet in its bucket."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_more_ranks_never_take_more(stage: int, precision: str) -> None:
    if stage == 0 and precision == "bf16":
        return
    config = from_mapping(TrainingConfig, case(stage, precision))
    sizes = [largest_rank(config, parameters(precision), world_size=n).largest(0) for n in (1, 2, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[-1] < sizes[0]) == (stage > 0)


def test_hierarchical_partitions_hold_a_second_copy_within_the_group() -> None:
    plain = from_mapping(TrainingConfig, case(3, "fp32"))
    assert plain.deepspeed is not None
    divided = dataclasses.replace(plain, deepspeed=dataclasses.replace(plain.deepspeed, hpz_partition_size=2))
    of_model = parameters("fp32")
    eight, in_groups = (rank_states(config, of_model, world_size=8) for config in (plain, divided))
    assert eight.secondary == 0
    whole = 4 * (of_model.trained + of_model.frozen)
    assert whole / 2 <= in_groups.secondary <= whole / 2 + 4 * 8 * len(of_model.of_model)


def test_what_is_offloaded_leaves_the_device() -> None:
    for stage in (1, 2, 3):
        plain = from_mapping(TrainingConfig, case(stage, "bf16"))
        assert plain.deepspeed is not None
        offloaded = dataclasses.replace(plain, deepspeed=dataclasses.replace(plain.deepspeed, offload_optimizer=True))
        before, after = (rank_states(config, parameters("bf16"), world_size=2) for config in (plain, offloaded))
        assert (after.master, after.moments) == (0, 0)
        assert after.host >= before.master + before.moments
        assert after.largest(0) < before.largest(0)


def test_parameters_are_told_apart_by_part() -> None:
    of_model = parameters("fp32")
    by_part = of_model.by_part()
    assert list(by_part) == ["embedding", "encoder", "state space", "decoder"]
    assert sum(trained for trained, _ in by_part.values()) == of_model.trained
    assert sum(frozen for _, frozen in by_part.values()) == of_model.frozen > 0
    assert by_part["embedding"] == (211 * 128, 0)

"""Model FLOPs against loops over every pair of tokens."""

import math

import pytest
import torch

from spade_t5 import SpadeT5Config
from spade_t5.flops import FlopsCounter
from spade_t5.training.data import Batch

PACKED = {
    "segment_ids": [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 3, 3, 0, 0]],
    "decoder_segment_ids": [[1, 1, 2, 0, 0], [1, 2, 2, 2, 3]],
    "labels": [[5, 6, 7, -100, -100], [5, -100, 6, 7, 8]],
}
PADDED = {
    "attention_mask": [[1] * 10, [1] * 4 + [0] * 6],
    "labels": [[5, 6, 7, 8, 9], [5, -100, 6, -100, -100]],
}
WHOLE = {"labels": [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]}


def as_batch(rows: dict[str, list[list[int]]]) -> Batch:
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return {"input_ids": torch.zeros(2, 10, dtype=torch.int64), **batch}


def brute_force(config: SpadeT5Config, rows: dict[str, list[list[int]]]) -> float:
    """The equations of the package's docstring, pair by pair."""
    width, inner = config.d_model, config.num_heads * config.d_kv
    block = {"gated-gelu": 3, "relu": 2}[config.feed_forward_proj] * width * config.d_ff
    forward, ssm = 0, 0.0
    for row in range(2):
        sources = rows["segment_ids"][row] if "segment_ids" in rows else rows.get("attention_mask", [[1] * 10] * 2)[row]
        labels = rows["labels"][row]
        last_label = max(i for i in range(5) if labels[i] != -100)
        targets = (
            rows["decoder_segment_ids"][row] if "segment_ids" in rows else [int(i <= last_label) for i in range(5)]
        )
        positions = [i - sources.index(sources[i]) for i in range(10)]

        def sees(i: int, j: int, sources: list[int] = sources, positions: list[int] = positions) -> bool:
            if config.local_attention == "chunk":
                chunk = config.local_radius + 1
                return positions[i] // chunk == positions[j] // chunk
            return config.local_attention == "full" or abs(i - j) <= config.local_radius

        for i in range(10):
            if sources[i] == 0:
                continue
            forward += config.num_layers * 2 * (4 * width * inner + block)
            forward += config.num_decoder_layers * 2 * 2 * width * inner
            if config.fusion == "concat":
                forward += len(config.global_layers) * 4 * width * width
            for j in range(10):
                if sources[j] == sources[i] and sees(i, j):
                    forward += config.num_layers * 4 * inner
        for i in range(5):
            if labels[i] != -100:
                forward += 2 * width * config.vocab_size
            if targets[i] == 0:
                continue
            forward += config.num_decoder_layers * 2 * (6 * width * inner + block)
            for j in range(i + 1):
                if targets[j] == targets[i]:
                    forward += config.num_decoder_layers * 4 * inner
            for j in range(10):
                if sources[j] == targets[i]:
                    forward += config.num_decoder_layers * 4 * inner
        for document in set(sources) - {0}:
            n = sources.count(document)
            m = 2 * n
            ssm += len(config.global_layers) * width * min(2 * n * n, 5 * m * math.log2(m) + 6 * (m / 2 + 1))
    return 3 * forward + 2 * ssm


@pytest.mark.parametrize("rows", [PACKED, PADDED, WHOLE], ids=["packed", "padded", "whole"])
@pytest.mark.parametrize("preset", ["tiny", "base", "xl", "spade-base-release"])
@pytest.mark.parametrize("attention", ["window", "chunk", "full"])
def test_equals_the_count_pair_by_pair(preset: str, attention: str, rows: dict[str, list[list[int]]]) -> None:
    config = SpadeT5Config.from_preset(preset, local_attention=attention, local_radius=2)
    assert FlopsCounter(config, backend="torch").batch(as_batch(rows)).model == brute_force(config, rows)


def test_a_row_of_padding_costs_the_model_nothing() -> None:
    config = SpadeT5Config.from_preset("tiny")
    counter = FlopsCounter(config, backend="torch")
    batch = as_batch(PACKED)
    with_empty_row = {
        name: torch.cat([tensor, torch.full_like(tensor[:1], -100 if name == "labels" else 0)])
        for name, tensor in batch.items()
    }
    assert counter.batch(with_empty_row).model == counter.batch(batch).model
    assert counter.batch(with_empty_row).executed > counter.batch(batch).executed


def test_a_packed_row_costs_what_its_documents_cost_alone() -> None:
    config = SpadeT5Config.from_preset("small")
    counter = FlopsCounter(config, backend="torch")
    alone = 0.0
    for inputs, targets in ((6, 2), (3, 1), (1, 1), (5, 3), (2, 1)):
        labels = torch.full((1, targets), 5)
        if (inputs, targets) == (5, 3):
            labels[0, 0] = -100
        alone += counter.batch({"input_ids": torch.zeros(1, inputs), "labels": labels}).model
    assert counter.batch(as_batch(PACKED)).model == pytest.approx(alone, rel=1e-12)


def test_a_classifier_scores_documents_and_has_no_decoder() -> None:
    config = SpadeT5Config.from_preset("tiny", global_layers=[], local_attention="full")
    width, inner = config.d_model, config.num_heads * config.d_kv
    batch = {
        "input_ids": torch.zeros(1, 10, dtype=torch.int64),
        "segment_ids": torch.tensor([[1, 1, 1, 1, 2, 2, 0, 0, 0, 0]]),
        "labels": torch.tensor([[1, -100]]),
    }
    layer = 2 * 6 * (4 * width * inner + 3 * width * config.d_ff) + 4 * inner * (16 + 4)
    head = 2 * width * (width + 2)
    counted = FlopsCounter(config, backend="torch", has_decoder=False).batch(batch)
    assert counted.model == 3 * (config.num_layers * layer + head)


@pytest.mark.parametrize(("training", "passes"), [("frozen", 2), ("output", 3), ("full", 3)])
def test_an_ssm_that_trains_has_a_kernel_to_make_and_to_differentiate(training: str, passes: int) -> None:
    config = SpadeT5Config.from_preset("tiny", ssm_training=training)
    without = SpadeT5Config.from_preset("tiny", global_layers=[])
    fusion = 3 * 4 * config.d_model**2 * 20
    ssm = (
        FlopsCounter(config, backend="torch").batch(as_batch(WHOLE)).model
        - FlopsCounter(without, backend="torch").batch(as_batch(WHOLE)).model
        - fusion
    )
    kernel = 2 * config.d_state * 2 * config.d_model * 10
    per_row = min(2 * 100, 5 * 20 * math.log2(20) + 6 * 11) * config.d_model
    assert ssm == pytest.approx(passes * 2 * per_row + {"frozen": 0, "output": 2, "full": 3}[training] * kernel)

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spade_t5.errors import ConfigError
from spade_t5.pretrain.corpora import FilesCorpus
from spade_t5.pretrain.objectives import SpanCorruption
from spade_t5.pretrain.prepare import PrepareConfig, prepare
from spade_t5.pretrain.rows import SpanCorruptionRows
from spade_t5.pretrain.store import TokenStore

OBJECTIVE = SpanCorruption(inputs_length=64)


def raw_rows(source: SpanCorruptionRows, row_numbers: list[int]) -> list[list[int]]:
    """The raw tokens of rows, put together from inputs and labels."""
    batch = source.collate(row_numbers)
    sentinels = source.store.tokenizer.sentinel_ids
    result = []
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        spans: dict[int, list[int]] = {}
        for token in labels[:-1]:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        result.append([t for token in inputs[:-1] for t in (spans[token] if token in sentinels else [token])])
    return result


def test_an_epoch_visits_every_segment_once(store_folder: Path) -> None:
    source = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1)
    count = source.num_segments
    assert source.num_rows is None
    assert count == source.store.split("train").num_tokens // source.raw_length
    epochs = [source.segments(range(count * epoch, count * (epoch + 1))).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(count))


def test_rows_are_the_store_s_tokens_in_place(store_folder: Path) -> None:
    """Concatenate and split: documents run on over row borders and nothing is lost but a last part of a row."""
    source = SpanCorruptionRows(store_folder, "validation", OBJECTIVE, seed=1, evaluation=True)
    assert source.num_rows == source.num_segments
    split = source.store.split("validation")
    joined = [token for row in raw_rows(source, list(range(source.num_rows))) for token in row]
    assert joined == split.tokens(0, len(joined)).tolist()
    assert split.num_tokens - len(joined) < source.raw_length
    training = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1)
    for row, segment in zip(raw_rows(training, [0, 5]), training.segments([0, 5]).tolist(), strict=True):
        start = segment * training.raw_length
        assert row == training.store.split("train").tokens(start, start + training.raw_length).tolist()


def test_a_row_is_a_function_of_seed_and_number(store_folder: Path) -> None:
    source = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1)
    batch = source.collate([3, 10**7, 8])
    for place, number in enumerate([3, 10**7, 8]):
        alone = pickle.loads(pickle.dumps(source)).collate([number])
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][place])
        assert torch.equal(alone["labels"][0], batch["labels"][place])
    other = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=2)
    assert not torch.equal(other.collate([3])["input_ids"], batch["input_ids"][:1])


def test_another_epoch_brings_other_noise(store_folder: Path) -> None:
    source = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1)
    count = source.num_segments
    again = count + source.segments(range(count, 2 * count)).tolist().index(int(source.segments([0])[0]))
    assert raw_rows(source, [0]) == raw_rows(source, [again])
    assert not torch.equal(source.collate([0])["labels"], source.collate([again])["labels"])


def test_shapes_and_padding_rows(store_folder: Path) -> None:
    source = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1)
    _, inputs, targets = OBJECTIVE.lengths()
    full = source.collate([0, 1])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in full.items()} == {
        "input_ids": ((2, inputs), torch.int64),
        "labels": ((2, targets), torch.int64),
    }
    batch = source.collate([0, -1, 1])
    assert torch.equal(batch["input_ids"][[0, 2]], full["input_ids"])
    assert torch.equal(batch["labels"][[0, 2]], full["labels"])
    assert batch["input_ids"][1].eq(0).all()
    assert batch["labels"][1].eq(-100).all()
    assert batch["segment_ids"].tolist() == [[1] * inputs, [0] * inputs, [1] * inputs]
    assert batch["decoder_segment_ids"].tolist() == [[1] * targets, [0] * targets, [1] * targets]
    assert source.collate([-1])["labels"].eq(-100).all()


def test_evaluation_can_use_a_part_spread_over_the_split(store_folder: Path) -> None:
    source = SpanCorruptionRows(store_folder, "train", OBJECTIVE, seed=1, evaluation=True, max_rows=10)
    assert source.num_rows == 10
    segments = source.segments(range(10))
    assert segments[0] == 0
    assert segments[-1] >= 0.85 * source.num_segments
    assert len(np.unique(segments)) == 10


def test_bad_settings_are_refused_before_the_first_row(
    tmp_path: Path, store_folder: Path, config_for: Callable[..., PrepareConfig]
) -> None:
    with pytest.raises(ConfigError, match=r"227 sentinels, the tokenizer has 120"):
        SpanCorruptionRows(store_folder, "train", SpanCorruption(inputs_length=4096), seed=0)
    (tmp_path / "short.txt").write_text("Too short for a row.\n")
    corpus = FilesCorpus(paths=(str(tmp_path / "short.txt"),))
    small = prepare(config_for(tmp_path / "small", corpus=corpus, held_out_fraction=0.0))
    with pytest.raises(ConfigError, match=r"takes 568 raw tokens a row, split 'train' .* has \d+;"):
        SpanCorruptionRows(small, "train", SpanCorruption(), seed=0)
    with pytest.raises(ConfigError, match="split 'validation'"):
        SpanCorruptionRows(small, "validation", OBJECTIVE, seed=0)
    with pytest.raises(ConfigError, match="made with tokenizer"):
        SpanCorruptionRows(TokenStore.open(store_folder), "train", OBJECTIVE, seed=0, tokenizer_hash="0" * 64)

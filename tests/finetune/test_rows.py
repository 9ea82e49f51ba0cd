import dataclasses
import logging
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spade_t5.finetune.rows import EncodedExamples, ExampleRows, RowsConfig, encode_examples, epoch_order, pack_examples
from spade_t5.finetune.sources import FolderSource
from spade_t5.finetune.task import Example, Task
from spade_t5.finetune.tasks.glue import Sst2
from spade_t5.training.data import ABSENT, EMPTY_ROW

X = -100


@pytest.fixture
def tokenizer(word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return word_tokenizer(["a", "b", "c", "d", "no", "yes"])


def toy_task(kind: str = "classification") -> Task:
    return Task(
        name="toy", kind=kind, splits={}, to_example=lambda row: row, metrics=("accuracy",),
        label_words=("no", "yes"), max_source_tokens=4, max_target_tokens=3,
    )  # fmt: skip


EXAMPLES = EncodedExamples(
    sources=[[3, 4, 1], [5, 1], [6, 6, 6, 1]],
    targets=[[7, 1], [8, 1], [7, 1]],
    labels=[0, 1, 0],
    num_cut_sources=0,
    num_cut_targets=0,
)


@pytest.mark.parametrize(
    "other",
    [
        EXAMPLES,
        dataclasses.replace(EXAMPLES, sources=[[3, 4, 1], [5], [1, 6, 6, 6, 1]]),
        dataclasses.replace(EXAMPLES, sources=EXAMPLES.targets, targets=EXAMPLES.sources),
        dataclasses.replace(EXAMPLES, targets=[[7, 1], [7, 1], [8, 1]]),
        dataclasses.replace(EXAMPLES, labels=[0, 1, 0.5]),
        dataclasses.replace(EXAMPLES, labels=None),
    ],
)
def test_the_fingerprint_tells_examples_apart(other: EncodedExamples) -> None:
    again = EncodedExamples(list(other.sources), list(other.targets), other.labels, 7, 7)
    assert (other.compute_fingerprint() == EXAMPLES.compute_fingerprint()) == (other is EXAMPLES)
    assert again.compute_fingerprint() == other.compute_fingerprint()


def test_sources_and_targets_keep_their_beginning_and_end_mark(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        Example(source="a b c d a", target="yes", reference=1),
        Example(source="a b c", target="no yes no", reference=0),
    ]
    with caplog.at_level(logging.WARNING):
        encoded = encode_examples(toy_task(), rows, tokenizer, RowsConfig())
    assert encoded.sources == [[3, 4, 5, 1], [3, 4, 5, 1]]
    assert encoded.targets == [[8, 1], [7, 8, 1]]
    assert (encoded.num_cut_sources, encoded.num_cut_targets) == (1, 1)
    assert "1 of 2 sources cut to 4 tokens" in caplog.text
    assert encoded.labels == [1, 0]
    longer = encode_examples(toy_task(), rows, tokenizer, RowsConfig(max_source_tokens=9, max_target_tokens=9))
    assert (longer.num_cut_sources, longer.num_cut_targets) == (0, 0)
    assert longer.sources[0] == [3, 4, 5, 6, 3, 1]


def test_the_rule_says_what_is_kept_of_a_long_source(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Example(source="a b c d a", target="no yes no yes", reference=1)]
    tail = encode_examples(toy_task(), rows, tokenizer, RowsConfig(truncation="tail"))
    assert (tail.sources, tail.targets) == ([[5, 6, 3, 1]], [[7, 8, 1]])


def test_only_a_task_with_labels_can_train_a_head(tokenizer: PreTrainedTokenizerFast) -> None:
    value = encode_examples(
        toy_task("regression"), [Example(source="a", target="b", reference=2.5)], tokenizer, RowsConfig()
    )
    text = encode_examples(
        toy_task("generation"), [Example(source="a", target="b", reference="b")], tokenizer, RowsConfig()
    )
    assert value.labels == [2.5]
    assert text.labels is None
    with pytest.raises(ValueError, match="num_outputs: a generation task"):
        ExampleRows(text, [(0,)], pad_token_id=0, num_outputs=2)


def test_worked_example_of_a_packed_batch() -> None:
    source = ExampleRows(EXAMPLES, [(0, 1), (2,)], pad_token_id=0)
    batch = source.collate([1, 0, EMPTY_ROW])
    assert batch["input_ids"].tolist() == [[6, 6, 6, 1, 0], [3, 4, 1, 5, 1], [0, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2], [0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1, X, X], [7, 1, 8, 1], [X, X, X, X]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 0, 0], [1, 1, 2, 2], [0, 0, 0, 0]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert source.num_rows == 2


def test_worked_example_of_a_packed_batch_for_a_head() -> None:
    batch = ExampleRows(EXAMPLES, [(0, 1), (2,)], pad_token_id=0, num_outputs=2).collate([0, 1, EMPTY_ROW])
    assert set(batch) == {"input_ids", "segment_ids", "labels", "sample_numbers"}
    assert batch["labels"].tolist() == [[0, 1], [0, X], [X, X]]
    assert batch["sample_numbers"].tolist() == [[0, 1], [2, ABSENT], [ABSENT, ABSENT]]


def test_absent_values_of_a_regression_are_nan() -> None:
    examples = EncodedExamples(EXAMPLES.sources, EXAMPLES.targets, [0.5, 1.5, 2.5], 0, 0)
    labels = ExampleRows(examples, [(0, 1), (2,)], pad_token_id=0, num_outputs=1).collate([0, 1])["labels"]
    assert labels.dtype == torch.float32
    assert labels.isnan().tolist() == [[False, False], [False, True]]
    assert labels[1, 0] == 2.5


def test_a_batch_of_empty_rows_alone_weighs_nothing() -> None:
    batch = ExampleRows(EXAMPLES, [(0,)], pad_token_id=0).collate([EMPTY_ROW, EMPTY_ROW])
    assert batch["input_ids"].shape == (2, 1)
    assert (batch["labels"] == X).all()
    assert not batch["segment_ids"].any()
    head = ExampleRows(EXAMPLES, [(0,)], pad_token_id=0, num_outputs=2).collate([EMPTY_ROW])
    assert head["labels"].tolist() == [[X]]


def test_every_epoch_visits_each_row_once_in_its_own_order() -> None:
    examples = EncodedExamples([[i, 1] for i in range(50)], [[i, 1] for i in range(50)], None, 0, 0)
    source = ExampleRows(examples, [(i,) for i in range(50)], pad_token_id=0, shuffle_seed=3)
    assert source.num_rows is None
    epochs = [[int(source.collate([n])["input_ids"][0, 0]) for n in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # a copy in another process, asked out of order, gives the same rows
    other = pickle.loads(pickle.dumps(source))
    assert [int(other.collate([n])["input_ids"][0, 0]) for n in (149, 0, 77)] == [
        epochs[2][49],
        epochs[0][0],
        epochs[1][27],
    ]
    assert epoch_order(3, 0, 50).tolist() != epoch_order(4, 0, 50).tolist()


def test_packed_rows_hold_every_example_once_within_the_room() -> None:
    lengths = [3, 9, 2, 7, 5, 1, 8, 4, 6, 2, 2, 3]
    examples = EncodedExamples([[5] * n for n in lengths], [[7] * min(n, 6) for n in lengths], None, 0, 0)
    rows = pack_examples(examples, row_tokens=10, seed=0)
    assert sorted(i for row in rows for i in row) == list(range(12))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) <= 7  # 52 tokens need 6 rows of 10
    assert pack_examples(examples, row_tokens=10, seed=0) == rows


def test_targets_need_room_too() -> None:
    examples = EncodedExamples([[5]] * 4, [[7] * 5] * 4, None, 0, 0)
    assert sorted(map(len, pack_examples(examples, row_tokens=10, seed=0))) == [2, 2]


def test_limits_too_small_for_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match="row_tokens: 1 must be at least 2"):
        RowsConfig(row_tokens=1)


def test_glue_rows_are_whole_after_encoding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("sentence\tlabel\na b \t1\nc \t0\n", encoding="utf-8")
    task = Sst2(source=FolderSource(path=tmp_path)).build()
    encoded = encode_examples(task, task.examples("train"), tokenizer, RowsConfig())
    assert [ids[-3:] for ids in encoded.sources] == [
        [3, 4, 1],
        [2, 5, 1],
    ]  # "sst2 sentence :" is unknown to this tokenizer
    assert encoded.labels == [1, 0]

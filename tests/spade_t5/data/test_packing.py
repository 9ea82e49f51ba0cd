import random

import pytest
import torch

from spade_t5.data.packing import Example, pack, render, render_inputs, render_labels, truncate
from spade_t5.errors import DataError


def test_worked_example_of_pack() -> None:
    packing = pack([(6, 1), (5, 1), (4, 1), (3, 1), (2, 1)], inputs_length=10, targets_length=8)
    assert packing.rows == [[0, 2], [1, 3, 4]]
    assert packing.inputs_efficiency == 20 / 20
    assert packing.targets_efficiency == 5 / 16


def test_every_example_is_in_one_row_that_holds_it() -> None:
    generator = random.Random(0)
    lengths = [(generator.randint(1, 100), generator.randint(1, 30)) for _ in range(3000)]
    packing = pack(lengths, inputs_length=128, targets_length=40, window=700)
    assert sorted(number for row in packing.rows for number in row) == list(range(3000))
    for row in packing.rows:
        assert sum(lengths[n][0] for n in row) <= 128
        assert sum(lengths[n][1] for n in row) <= 40
        assert len({n // 700 for n in row}) == 1
    assert packing == pack(lengths, inputs_length=128, targets_length=40, window=700)


def test_short_documents_fill_rows() -> None:
    generator = random.Random(1)
    lengths = [(min(1024, int(generator.lognormvariate(5.5, 0.9)) + 2), 1) for _ in range(4096)]
    assert pack(lengths, inputs_length=1024, targets_length=1024).inputs_efficiency > 0.97


def test_rows_of_a_window_depend_on_its_examples_alone() -> None:
    generator = random.Random(2)
    lengths = [(generator.randint(1, 100), 1) for _ in range(600)]
    whole = pack(lengths, inputs_length=128, targets_length=128, window=200).rows
    second = pack(lengths[200:400], inputs_length=128, targets_length=128, window=200).rows
    assert [[n + 200 for n in row] for row in second] == [row for row in whole if 200 <= row[0] < 400]


def test_at_most_so_many_documents_share_a_row() -> None:
    packing = pack([(1, 1)] * 10, inputs_length=100, targets_length=100, max_documents=4)
    assert [len(row) for row in packing.rows] == [4, 4, 2]
    assert [len(row) for row in pack([(1, 1)] * 3, inputs_length=9, targets_length=9, max_documents=1).rows] == [
        1,
        1,
        1,
    ]


def test_examples_longer_than_a_row_are_not_cut() -> None:
    with pytest.raises(DataError, match="example 1: 11 input and 1 target tokens"):
        pack([(3, 1), (11, 1)], inputs_length=10, targets_length=4)
    with pytest.raises(DataError, match="example 0"):
        pack([(3, 5)], inputs_length=10, targets_length=4)


def test_nothing_packs_into_nothing() -> None:
    assert pack([], inputs_length=4, targets_length=4) == ([], 0.0, 0.0)


def test_worked_example_of_render() -> None:
    row = [Example([5, 6, 1], [7, 1]), Example([8, 1], [9, 1])]
    batch = render([row, []], inputs_length=6, targets_length=5, pad_token_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 1, 8, 1, 0], [0] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [0] * 6],
        "labels": [[7, 1, 9, 1, -100], [-100] * 5],
        "decoder_segment_ids": [[1, 1, 2, 2, 0], [0] * 5],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="row 0: documents of 5 tokens in a row of 4"):
        render_inputs([[[5, 6, 1], [8, 1]]], length=4, pad_token_id=0)


def test_labels_of_documents() -> None:
    labels = render_labels([[2, None], [], [1, 0, 3]], max_documents=3)
    assert labels.tolist() == [[2, -100, -100], [-100] * 3, [1, 0, 3]]
    assert labels.dtype == torch.int64
    scores = render_labels([[2.5], [None, 0.0]], max_documents=2, regression=True)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.isnan(), torch.tensor([[False, True], [True, False]]))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("head", [11, 12, 13, 1]), ("tail", [13, 14, 15, 1]), ("head_and_tail", [11, 12, 15, 1])],
)
def test_truncation_keeps_eos(rule: str, kept: list[int]) -> None:
    tokens = [11, 12, 13, 14, 15, 1]
    assert truncate(tokens, 4, rule, eos_token_id=1) == kept  # type: ignore[arg-type]
    assert truncate(tokens, 6, rule, eos_token_id=1) == tokens  # type: ignore[arg-type]
    assert truncate(tokens, 1, rule, eos_token_id=1) == [1]  # type: ignore[arg-type]


def test_truncation_without_eos_and_of_unknown_rules() -> None:
    assert truncate([11, 12, 13], 2, "tail", eos_token_id=1) == [12, 13]
    assert truncate([11, 12, 13], 1, "head_and_tail", eos_token_id=1) == [11]
    with pytest.raises(ValueError, match="rule"):
        truncate([11, 12, 13], 2, "middle", eos_token_id=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length"):
        truncate([11], 0, "head", eos_token_id=1)

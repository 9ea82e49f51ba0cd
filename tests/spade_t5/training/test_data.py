"""Rows of a step: each exactly once, whatever the number of ranks and the size of micro-batches."""

from collections.abc import Sequence

import pytest
import torch

from spade_t5.training.data import EMPTY_ROW, Batch, evaluation_batches, rank_rows, training_batches


class Numbers:
    """Rows that hold their own number."""

    num_rows = 7

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        return {"row": torch.tensor(row_numbers)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_rows", [1, 2, 5])
def test_every_row_once(world_size: int, micro_batch_rows: int) -> None:
    ranks = [
        rank_rows(20, 11, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows)
        for rank in range(world_size)
    ]
    rows = [row for batches in ranks for batch in batches for row in batch if row != EMPTY_ROW]
    assert sorted(rows) == list(range(20, 31))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == micro_batch_rows for batches in ranks for batch in batches)


def test_rank_takes_slots_modulo_world_size() -> None:
    assert rank_rows(10, 5, rank=1, world_size=2, micro_batch_rows=2) == [[11, 13], [-1, -1]]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_follow_one_another_and_a_resume_continues(workers: int) -> None:
    def rows(first_step: int) -> list[list[list[int]]]:
        batches = training_batches(
            Numbers(),
            first_step=first_step,
            last_step=4,
            global_batch_rows=6,
            micro_batch_rows=2,
            rank=1,
            world_size=2,
            workers=workers,
        )
        return [[batch["row"].tolist() for batch in step] for step in batches]

    assert rows(1)[0] == [[1, 3], [5, -1]]
    assert rows(1)[1] == [[7, 9], [11, -1]]
    assert rows(3) == rows(1)[2:]


def test_evaluation_covers_everything_once() -> None:
    batches = [
        batch["row"].tolist()
        for rank in range(2)
        for batch in evaluation_batches(Numbers(), micro_batch_rows=3, rank=rank, world_size=2)
    ]
    assert batches == [[0, 2, 4], [6, -1, -1], [1, 3, 5], [-1, -1, -1]]


@pytest.mark.parametrize("name", ["segment_ids", "decoder_segment_ids"])
def test_documents_out_of_order_are_refused_before_they_reach_a_device(name: str) -> None:
    class Rows:
        num_rows = 1

        def collate(self, row_numbers: Sequence[int]) -> dict[str, torch.Tensor]:
            return {name: torch.tensor([[2, 2, 1]])}

    with pytest.raises(ValueError, match=f"{name} decrease within a row"):
        next(evaluation_batches(Rows(), micro_batch_rows=1, rank=0, world_size=1))

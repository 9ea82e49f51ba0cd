"""From numbered rows to the micro-batches of one rank.

Step s of a run uses rows [(s - 1) * B, s * B) for the global batch size B; rank r takes the rows whose place in the batch is r modulo the
world size. So a resumed run, or a run on another number of ranks, meets the same rows in the same step, and nothing about the data needs
to be saved but the step.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spade_t5.ops import check_segment_order

Batch = dict[str, Tensor]
EMPTY_ROW = -1


class RowSource(Protocol):
    """Numbered rows of a data set."""

    num_rows: int | None
    """How many there are; None when they never end."""

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        """The batch of these rows, a pure function; the number -1 stands for a row of padding that weighs nothing."""
        ...


def rank_rows(first: int, count: int, *, rank: int, world_size: int, micro_batch_rows: int) -> list[list[int]]:
    """Row numbers of one rank's micro-batches in a global batch of rows first, first + 1, ..., first + count - 1.

    Every rank gets the same number of micro-batches of the same size, filled up with empty rows.

    >>> rank_rows(10, 5, rank=1, world_size=2, micro_batch_rows=2)
    [[11, 13], [-1, -1]]
    """
    own = list(range(first + rank, first + count, world_size))
    per_rank = -(-count // world_size)
    num_micro_batches = -(-per_rank // micro_batch_rows)
    own += [EMPTY_ROW] * (num_micro_batches * micro_batch_rows - len(own))
    return [own[i : i + micro_batch_rows] for i in range(0, len(own), micro_batch_rows)]


class _MicroBatches(Dataset[Batch]):
    """Micro-batches by number, so that loader processes need no state."""

    def __init__(self, source: RowSource, row_lists: Sequence[list[int]]) -> None:
        self.source = source
        self.row_lists = row_lists

    def __len__(self) -> int:
        return len(self.row_lists)

    def __getitem__(self, index: int) -> Batch:
        batch = self.source.collate(self.row_lists[index])
        # here, on the CPU, because the kernels rely on it and a GPU must not be asked
        for name in ("segment_ids", "decoder_segment_ids"):
            if name in batch:
                check_segment_order(batch[name], name)
        return batch


class _StepRows(Sequence[list[int]]):
    """Row numbers of all micro-batches from one step to another, computed when asked for."""

    def __init__(
        self, first_step: int, last_step: int, *, batch_rows: int, rank: int, world_size: int, micro: int
    ) -> None:
        self.first_step, self.last_step, self.batch_rows = first_step, last_step, batch_rows
        self.rank, self.world_size, self.micro = rank, world_size, micro
        self.per_step = len(self._rows(first_step))

    def _rows(self, step: int) -> list[list[int]]:
        first = (step - 1) * self.batch_rows
        return rank_rows(
            first, self.batch_rows, rank=self.rank, world_size=self.world_size, micro_batch_rows=self.micro
        )

    def __len__(self) -> int:
        return (self.last_step - self.first_step + 1) * self.per_step

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        step, micro = divmod(index, self.per_step)
        return self._rows(self.first_step + step)[micro]


def training_batches(
    source: RowSource,
    *,
    first_step: int,
    last_step: int,
    global_batch_rows: int,
    micro_batch_rows: int,
    rank: int,
    world_size: int,
    workers: int,
) -> Iterator[list[Batch]]:
    """The micro-batches of one rank, a list for each step from `first_step` to `last_step`."""
    rows = _StepRows(
        first_step, last_step, batch_rows=global_batch_rows, rank=rank, world_size=world_size, micro=micro_batch_rows
    )
    loader = iter(_loader(source, rows, workers))
    for _ in range(first_step, last_step + 1):
        yield [next(loader) for _ in range(rows.per_step)]


def evaluation_batches(source: RowSource, *, micro_batch_rows: int, rank: int, world_size: int) -> Iterator[Batch]:
    """One rank's share of every row of a finite source, the same number of batches on each rank."""
    assert source.num_rows is not None, "evaluation needs a finite source"
    rows = rank_rows(0, source.num_rows, rank=rank, world_size=world_size, micro_batch_rows=micro_batch_rows)
    return iter(_loader(source, rows, 0))


def _loader(source: RowSource, rows: Sequence[list[int]], workers: int) -> DataLoader[Batch]:
    return DataLoader(
        _MicroBatches(source, rows),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )

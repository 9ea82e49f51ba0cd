"""From rows to the micro-batches of one rank.

A source of training rows owns its order and its *cursor*, a few JSON values that say which row comes next. Step s of a run takes the next B
rows, as many as `StepRows` gives it; rank r takes those whose place in the batch is r modulo the world size. So a resumed run, or a run on another
number of ranks, meets the same rows in the same step, and nothing about the data needs to be saved but the cursor.
"""

import functools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spade_t5.errors import UserError
from spade_t5.ops import check_segment_order
from spade_t5.training import distributed
from spade_t5.training.batch_warmup import BatchWarmupConfig, StepRows

Batch = dict[str, Tensor]
"""What the model takes, and two more entries that the objective takes out: `sample_numbers` and `loss_groups`, both (B, S) int64.

Column s belongs to document s + 1 of the row, `ABSENT` where there is none. Without `segment_ids` a row is one document.
"""

Cursor = dict[str, Any]
"""JSON values that say where the next row comes from."""

EMPTY_ROW = -1
ABSENT = -1
"""In `sample_numbers` and `loss_groups`: a row has no such document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How the rows of a step are shared out."""

    global_rows: int
    """Rows of one optimizer step, over all ranks and micro-batches, behind the warm-up of the batch."""
    micro_rows: int
    """Rows that one rank runs through the model at once."""
    rank: int
    """This process among all, from 0."""
    world_size: int
    """Number of ranks."""
    workers: int = 0
    """Processes of this rank that prepare batches ahead; 0: none."""
    warmup: BatchWarmupConfig | None = None
    """Fewer rows in the first steps of the run; None: as many in every step."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of every rank in one step of the whole global batch."""
        return self._micro_batches(self.global_rows)

    def rows_of(self, step: int) -> int:
        """Rows of step 1, 2, ... of the run."""
        return StepRows(self.global_rows, self.warmup).of(step)

    def num_micro_batches_of(self, step: int) -> int:
        """Micro-batches of every rank in that step."""
        return self._micro_batches(self.rows_of(step))

    def _micro_batches(self, rows: int) -> int:
        return -(-rows // (self.world_size * self.micro_rows))


class StepBatches(NamedTuple):
    """What one rank trains on in one step."""

    micro_batches: list[Batch]
    """Equally many on every rank."""
    cursor: Cursor
    """Behind the last row of the step, as far as this rank knows; `merge_cursors` joins what the ranks know."""


class RowSource(Protocol):
    """A finite number of numbered rows, for evaluation."""

    num_rows: int | None
    """How many there are; None when they never end."""

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        """The batch of these rows, a pure function; the number -1 stands for a row of padding that weighs nothing."""
        ...


class TrainingRows(Protocol):
    """Rows to train on, in an order that the source decides."""

    def steps(
        self, cursor: Cursor | None, num_steps: int, shape: BatchShape, *, first_step: int = 1
    ) -> Generator[StepBatches, None, None]:
        """One rank's share of `num_steps` steps from the rows behind a cursor on; None starts at the first row.

        Args:
            cursor: where the rows of the first of these steps begin.
            num_steps: how many steps.
            shape: how the rows of a step are shared out.
            first_step: number of the first of them in the run, which says how many rows it has.
        """
        ...

    def merge_cursors(self, cursors: Sequence[Cursor]) -> Cursor:
        """The cursor to save, from those that all ranks have behind the same step."""
        ...


class NumberedRows(ABC):
    """Base of sources whose rows have numbers: training rows by a sampler of numbers, evaluation rows if there are finitely many."""

    num_rows: int | None = None

    @abstractmethod
    def collate(self, row_numbers: Sequence[int]) -> Batch:
        """See `RowSource`."""

    def next_rows(self, cursor: Cursor | None, count: int) -> tuple[Sequence[int], Cursor]:
        """Numbers of the next rows, and the cursor behind them; here 0, 1, 2, ..."""
        first = 0 if cursor is None else int(cursor["row"])
        return range(first, first + count), {"row": first + count}

    def steps(
        self, cursor: Cursor | None, num_steps: int, shape: BatchShape, *, first_step: int = 1
    ) -> Generator[StepBatches, None, None]:
        """See `TrainingRows`."""
        numbers = range(first_step, first_step + num_steps)
        sampler = _MicroBatchNumbers(self, cursor, numbers, shape)
        batches = _batches(self, sampler, shape.workers)
        for step in numbers:
            micro_batches = [next(batches) for _ in range(shape.num_micro_batches_of(step))]
            yield StepBatches(micro_batches, sampler.cursors.popleft())

    def merge_cursors(self, cursors: Sequence[Cursor]) -> Cursor:
        """Every rank knows the whole order."""
        return cursors[0]


def rank_rows(rows: Sequence[int], shape: BatchShape) -> list[list[int]]:
    """Row numbers of one rank's micro-batches in a global batch, every rank's filled up with empty rows to the same size.

    >>> rank_rows(range(10, 15), BatchShape(global_rows=5, micro_rows=2, rank=1, world_size=2))
    [[11, 13], [-1, -1]]
    """
    own = list(rows[shape.rank :: shape.world_size])
    per_rank = -(-len(rows) // shape.world_size)
    num_micro_batches = -(-per_rank // shape.micro_rows)
    own += [EMPTY_ROW] * (num_micro_batches * shape.micro_rows - len(own))
    return [own[i : i + shape.micro_rows] for i in range(0, len(own), shape.micro_rows)]


def evaluation_batches(source: RowSource, *, micro_batch_rows: int, rank: int, world_size: int) -> Iterator[Batch]:
    """One rank's share of every row of a finite source, the same number of batches on each rank."""
    assert source.num_rows is not None, "evaluation needs a finite source"
    shape = BatchShape(global_rows=source.num_rows, micro_rows=micro_batch_rows, rank=rank, world_size=world_size)
    return _batches(source, rank_rows(range(source.num_rows), shape), 0)


def model_arguments(batch: Batch) -> Batch:
    """The entries of a batch that the model takes."""
    return {name: tensor for name, tensor in batch.items() if name not in ("sample_numbers", "loss_groups")}


def checked(batch: Batch) -> Batch:
    """A batch whose documents are in order: here, on the CPU, because kernels rely on it and a GPU must not be asked."""
    for name in ("segment_ids", "decoder_segment_ids"):
        if name in batch:
            check_segment_order(batch[name], name)
    return batch


class _MicroBatchNumbers:
    """Row numbers of one rank's micro-batches, step after step, drawn as far ahead as the loader asks; remembers each step's cursor."""

    def __init__(self, source: NumberedRows, cursor: Cursor | None, steps: range, shape: BatchShape) -> None:
        self.cursors: deque[Cursor] = deque()
        self._source, self._cursor, self._steps, self._shape = source, cursor, steps, shape

    def __iter__(self) -> Iterator[list[int]]:
        cursor = self._cursor
        for step in self._steps:
            rows, cursor = self._source.next_rows(cursor, self._shape.rows_of(step))
            self.cursors.append(cursor)
            yield from rank_rows(rows, self._shape)


class _Collated(Dataset[Batch | UserError]):
    """Batches by their row numbers, so that loader processes need no state."""

    def __init__(self, source: RowSource) -> None:
        self.source = source

    def __getitem__(self, row_numbers: list[int]) -> Batch | UserError:
        try:
            return checked(self.source.collate(row_numbers))
        except UserError as error:  # raised in a loader process it would reach the user as a traceback
            return error


def _batches(source: RowSource, row_lists: Any, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _Collated(source),
        batch_size=None,
        sampler=row_lists,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(distributed.begin_worker, os.getpid()),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch

"""The batch grows: its rows by formula, the rows of every step at any number of ranks, and a resume in the middle."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from spade_t5.testing.ranks import call_on_ranks
from spade_t5.testing.trainers import tiny_trainer, train_metrics
from spade_t5.training import distributed
from spade_t5.training.batch_warmup import BatchWarmupConfig, StepRows
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import EMPTY_ROW, Batch, BatchShape, NumberedRows

WARMUP = BatchWarmupConfig(initial_rows=2, steps=5, increment_rows=3)
ROWS = [2, 2, 5, 5, 8, 9, 9, 9]


def test_rows_of_steps() -> None:
    rows = StepRows(9, WARMUP)
    assert [rows.of(step) for step in range(1, 9)] == ROWS
    assert [rows.before(step) for step in range(1, 9)] == [sum(ROWS[:n]) for n in range(8)]
    assert StepRows(9).before(8) == 63
    assert {StepRows(8, BatchWarmupConfig(initial_rows=8, steps=4)).of(step) for step in range(1, 9)} == {8}
    # more levels than steps: some are passed over, and none exceeds the whole batch
    assert [StepRows(9, BatchWarmupConfig(initial_rows=1, steps=3)).of(step) for step in range(1, 5)] == [1, 3, 6, 9]


@pytest.mark.parametrize("warmup", [None, WARMUP])
def test_as_few_steps_as_hold_the_rows(warmup: BatchWarmupConfig | None) -> None:
    rows = StepRows(9, warmup)
    for total in range(1, 60):
        steps = rows.num_steps(total)
        assert rows.before(steps) < total <= rows.before(steps + 1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="initial_rows: 0 must be at least 1"):
        BatchWarmupConfig(initial_rows=0, steps=3)
    with pytest.raises(ValueError, match="batch_warmup: initial_rows 2 is above global_batch_rows 1"):
        TrainingConfig(steps=9, global_batch_rows=1, micro_batch_rows=1, batch_warmup=WARMUP)


class Numbers(NumberedRows):
    """Rows that hold their own number."""

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        return {"row": torch.tensor(row_numbers)}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_every_row_comes_once_and_a_cursor_continues_in_the_middle(world_size: int, workers: int) -> None:
    first, cursor = 0, None
    shapes = [
        BatchShape(global_rows=9, micro_rows=2, rank=rank, world_size=world_size, workers=workers, warmup=WARMUP)
        for rank in range(world_size)
    ]
    for begin, count in ((1, 3), (4, 5)):
        ranks = [list(Numbers().steps(cursor, count, one, first_step=begin)) for one in shapes]
        for number, parts in enumerate(zip(*ranks, strict=True), begin):
            assert {len(part.micro_batches) for part in parts} == {shapes[0].num_micro_batches_of(number)}
            found = [row for part in parts for batch in part.micro_batches for row in batch["row"].tolist()]
            assert sorted(set(found) - {EMPTY_ROW}) == list(range(first, first + ROWS[number - 1]))
            first += ROWS[number - 1]
            cursor = parts[0].cursor
            assert cursor == {"row": first}


SETTINGS = {"steps": 8, "global_batch_rows": 9, "micro_batch_rows": 1, "batch_warmup": WARMUP}


def train_at_every_stage(folder: str) -> dict[str, list[float]]:
    """Losses and gradient norms."""
    found = {}
    for stage in (0, 1, 2, 3):
        run_dir = Path(folder) / str(stage)
        zero = DeepSpeedConfig(zero_stage=stage, persistence_threshold_numel=50)  # type: ignore[arg-type]
        tiny_trainer(run_dir, deepspeed=zero, **SETTINGS).fit()
        found[str(stage)] = [*train_metrics(run_dir, "loss"), *train_metrics(run_dir, "grad_norm")]
    distributed.shutdown()
    return found


def test_two_ranks_accumulate_as_one_process_does_and_resume_in_the_middle(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    tiny_trainer(whole, save_every_steps=1, keep_checkpoints=9, **SETTINGS).fit()
    assert train_metrics(whole, "tokens") == [12 * sum(ROWS[: n + 1]) for n in range(8)]
    resumed = tiny_trainer(tmp_path / "resumed", **SETTINGS)
    resumed.resume(whole / "checkpoints" / "step-00000003")
    resumed.fit()
    for key in ("loss", "grad_norm", "samples", "lr"):
        assert train_metrics(tmp_path / "resumed", key) == train_metrics(whole, key)[3:]
    found = call_on_ranks(
        train_at_every_stage, {"folder": str(tmp_path / "runs")}, num_ranks=2, log_dir=tmp_path / "logs"
    )[0]
    for stage in "0123":
        expected = [*train_metrics(whole, "loss"), *train_metrics(whole, "grad_norm")]
        assert found[stage] == pytest.approx(expected, rel=1e-4), stage

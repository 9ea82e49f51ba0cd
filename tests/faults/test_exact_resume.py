"""A run that goes on from a checkpoint is the run that was never interrupted, bit for bit; and saving changes nothing.

Stages x precisions x accumulation x loader workers: a few of the combinations here, all of them in `make test-faults`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint import checkpoint_path
from spade_t5.testing.ranks import launch_ranks
from spade_t5.testing.runs import assert_exact, write_recipe

NUM_RANKS = 2
MICRO_ROWS = 2
MODEL = {"num_decoder_layers": 1, "d_model": 32, "d_ff": 64}
FEW = [(1, "bf16", 4, 2), (2, "fp32", 2, 0), (3, "fp32", 1, 2)]
ALL = list(itertools.product((1, 2, 3), ("fp32", "bf16"), (1, 2, 4), (0, 2)))


class Runs:
    """Runs of one combination."""

    def __init__(
        self,
        folder: Path,
        stores: Sequence[Path],
        *,
        zero_stage: int,
        precision: str,
        accumulation: int,
        workers: int,
        steps: int,
    ) -> None:
        self._folder = folder
        self._recipe = write_recipe(
            folder / "recipe.yaml",
            stores,
            model=MODEL,
            steps=steps,
            global_batch_rows=NUM_RANKS * MICRO_ROWS * accumulation,
            micro_batch_rows=MICRO_ROWS,
            precision=precision,
            loader_workers=workers,
            deepspeed={"zero_stage": zero_stage, "persistence_threshold_numel": 2000},
        )

    def train(self, name: str, *, resume: Path | None = None, **training: Any) -> Path:
        words = ["pretrain", str(self._recipe), f"run_dir={self._folder / name}"]
        words += [f"training.{key}={'null' if value is None else value}" for key, value in training.items()]
        words += [] if resume is None else ["--resume", str(resume)]
        with launch_ranks(words, num_ranks=NUM_RANKS, log_dir=self._folder / "logs" / name) as group:
            assert group.wait(300) == [0, 0], group.errors()
            group.assert_gone()
        return self._folder / name


@pytest.mark.parametrize(("zero_stage", "precision", "accumulation", "workers"), FEW)
def test_resumed_twice_in_the_middle(
    zero_stage: int, precision: str, accumulation: int, workers: int, tmp_path: Path, stores: list[Path]
) -> None:
    runs = Runs(
        tmp_path,
        stores,
        zero_stage=zero_stage,
        precision=precision,
        accumulation=accumulation,
        workers=workers,
        steps=9,
    )
    undisturbed = runs.train("undisturbed", save_every_steps=None)
    saving = runs.train("saving", save_every_steps=4, keep_every_steps=4)
    assert_exact(saving, undisturbed)
    for name in ("once", "twice"):
        resumed = runs.train(name, resume=checkpoint_path(saving / "checkpoints", 4), save_every_steps=None)
        assert_exact(resumed, undisturbed, after_step=4)


@pytest.mark.faults
@pytest.mark.parametrize(("zero_stage", "precision", "accumulation", "workers"), ALL)
def test_resumed_at_the_first_a_middle_and_the_last_but_one_step(
    zero_stage: int, precision: str, accumulation: int, workers: int, tmp_path: Path, stores: list[Path]
) -> None:
    steps = 103
    runs = Runs(
        tmp_path,
        stores,
        zero_stage=zero_stage,
        precision=precision,
        accumulation=accumulation,
        workers=workers,
        steps=steps,
    )
    undisturbed = runs.train("undisturbed", save_every_steps=None)
    saving = runs.train("saving", save_every_steps=1, keep_checkpoints=steps)
    assert_exact(saving, undisturbed)
    for step in (1, 51, steps - 1):
        for name in ("once", "twice"):
            resume = checkpoint_path(saving / "checkpoints", step)
            resumed = runs.train(f"{name}-{step}", resume=resume, save_every_steps=None)
            assert_exact(resumed, undisturbed, after_step=step)

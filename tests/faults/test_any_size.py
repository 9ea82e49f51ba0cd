"""A checkpoint goes on at another number of ranks, at another ZeRO stage, or without DeepSpeed: the same state, samples and losses."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spade_t5.checkpoint import CheckpointSaver, Retention, checkpoint_path, read_state, take_snapshot
from spade_t5.testing.ranks import launch_ranks
from spade_t5.testing.runs import assert_same_tensors, checkpoint_tensors, lineage, write_recipe
from spade_t5.training.engine import Trainer

ROWS = 12
SAVED_STEP = 10
RELATIVE_BOUND = 1e-5
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "learning_rate": 1e-3},
    "rms_scaled_adamw": {"name": "rms_scaled_adamw", "learning_rate": 1e-3},
}


class Size(NamedTuple):
    """How a run is carried out."""

    num_ranks: int
    zero_stage: int | None
    """None: without DeepSpeed."""

    def __str__(self) -> str:
        return f"{self.num_ranks}-ranks-" + ("plain" if self.zero_stage is None else f"zero-{self.zero_stage}")


SOURCE = Size(2, 3)
TARGETS = [Size(1, 0), Size(3, 1), Size(4, 2), Size(1, None)]
STAGES = [Size(2, 1), Size(2, 2), Size(2, 3), Size(2, 1)]
WORLDS = [(Size(2, 2), Size(1, 2)), (Size(1, 1), Size(2, 3)), (Size(4, 3), Size(2, 1)), (Size(4, 1), Size(1, 3))]


def save_when_resumed(folder: str) -> None:
    """A hook: what a run has loaded is saved at once, before any step."""
    resume = Trainer.resume

    def resume_and_save(self: Trainer, *arguments: Any, **options: Any) -> None:
        resume(self, *arguments, **options)
        facts = {"tokens": self._tokens, "cursor": self._cursor}
        saver = CheckpointSaver(Path(folder), Retention())
        saver.save(take_snapshot(self.backend, step=self._step, facts=facts, average=self._average))
        saver.wait()
        saver.close()

    Trainer.resume = resume_and_save  # type: ignore[method-assign]


class Runs:
    """Runs that differ in size only."""

    def __init__(self, folder: Path, stores: Sequence[Path], optimizer: str, num_steps: int) -> None:
        self.num_steps = num_steps
        self._folder = folder
        self._recipe = write_recipe(
            folder / "recipe.yaml",
            stores,
            model={"dropout_rate": 0.0, "num_decoder_layers": 1},
            steps=SAVED_STEP + num_steps,
            global_batch_rows=ROWS,
            micro_batch_rows=6,
            optimizer=OPTIMIZERS[optimizer],
            schedule={"name": "constant"},
            loader_workers=0,
            save_every_steps=SAVED_STEP,
            keep_every_steps=SAVED_STEP,
        )

    def train(self, name: str, size: Size, resume: Path | None = None) -> Path:
        """Trains to the end; what was resumed is saved again in the folder `again`."""
        run_dir = self._folder / name
        words = ["pretrain", str(self._recipe), f"run_dir={run_dir}"]
        words.append(f"training.deepspeed={_deepspeed(size)}")
        if resume is not None:
            words += ["--resume", str(resume)]
        with launch_ranks(
            words,
            num_ranks=size.num_ranks,
            log_dir=self._folder / "logs" / name,
            hook=save_when_resumed,
            hook_arguments={"folder": str(run_dir / "again")},
        ) as group:
            assert group.wait(300) == [0] * size.num_ranks, group.errors()
            group.assert_gone()
        return run_dir

    def check(self, run_dir: Path, source: Path) -> None:
        """Compares a resumed run with the run whose checkpoint it has."""
        saved = checkpoint_path(source / "checkpoints", SAVED_STEP)
        again = checkpoint_path(run_dir / "again", SAVED_STEP)
        assert_same_tensors(again, saved)
        steps, expected = lineage(run_dir), lineage(source)
        assert list(steps) == list(range(SAVED_STEP + 1, SAVED_STEP + self.num_steps + 1))
        for step, facts in steps.items():
            assert facts.samples == expected[step].samples
            assert (facts.targets, facts.tokens, facts.lr) == (
                expected[step].targets,
                expected[step].tokens,
                expected[step].lr,
            )
            assert float.fromhex(facts.loss) == pytest.approx(float.fromhex(expected[step].loss), rel=RELATIVE_BOUND)


def _deepspeed(size: Size) -> str:
    return (
        "null" if size.zero_stage is None else f"{{zero_stage: {size.zero_stage}, persistence_threshold_numel: 5000}}"
    )


def check_all_targets(folder: Path, stores: Sequence[Path], optimizer: str) -> None:
    runs = Runs(folder, stores, optimizer, num_steps=50)
    source = runs.train("source", SOURCE)
    saved = checkpoint_path(source / "checkpoints", SAVED_STEP)
    names = checkpoint_tensors(saved)
    assert {name.split("/")[0] for name in names} == {"weight", "exp_avg", "exp_avg_sq", "ema", "frozen"}
    # The state-space model is frozen; the head is the embedding, and is there once.
    assert any(name.startswith("frozen/") and "global" in name for name in names)
    assert not any("lm_head" in name for name in names)
    assert read_state(saved)["step"] == SAVED_STEP
    for target in TARGETS:
        run_dir = runs.train(str(target), target, saved)
        runs.check(run_dir, source)
        shutil.rmtree(run_dir)


def test_two_ranks_of_zero_3_go_on_at_any_size(tmp_path: Path, stores: list[Path]) -> None:
    check_all_targets(tmp_path, stores, "adamw")


@pytest.mark.faults
def test_two_ranks_of_zero_3_go_on_at_any_size_with_rms_scaled_adamw(tmp_path: Path, stores: list[Path]) -> None:
    check_all_targets(tmp_path, stores, "rms_scaled_adamw")


@pytest.mark.faults
@pytest.mark.parametrize(("source", "target"), [*itertools.pairwise(STAGES), *WORLDS], ids=str)
def test_from_one_size_to_another(source: Size, target: Size, tmp_path: Path, stores: list[Path]) -> None:
    runs = Runs(tmp_path, stores, "adamw", num_steps=50)
    first = runs.train("source", source)
    second = runs.train("target", target, checkpoint_path(first / "checkpoints", SAVED_STEP))
    runs.check(second, first)

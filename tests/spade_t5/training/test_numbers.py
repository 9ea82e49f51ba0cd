"""Losses, gradients, weights and optimizer states that go wrong: noticed at once, on all ranks, and traced to what caused it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.checkpoint import list_checkpoints, read_state, read_weights
from spade_t5.errors import RunAbortedError, SaveError
from spade_t5.hf.loading import build_model
from spade_t5.testing import documented
from spade_t5.testing.ranks import call_on_ranks
from spade_t5.training import Batch, DeepSpeedConfig, Seq2SeqObjective, TrainingConfig, distributed
from spade_t5.training.data import EMPTY_ROW, NumberedRows
from spade_t5.training.engine import Trainer, start
from spade_t5.training.objectives import LossSums
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.reporting import read_lines, read_metrics
from spade_t5.training.spikes import SpikesConfig

SIZE = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
ROWS_PER_STEP = 4


class Rows(NumberedRows):
    """Row n is sample n, twelve inputs and six targets from one of four rows, so that it can be learned."""

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        rows = torch.stack(
            [torch.randint(2, 50, (18,), generator=torch.Generator().manual_seed(n % 4)) for n in row_numbers]
        )
        numbers = torch.tensor(row_numbers)[:, None]
        return {
            "input_ids": rows[:, :12],
            "labels": torch.where(numbers != EMPTY_ROW, rows[:, 12:], -100),
            "sample_numbers": numbers,
        }


class FaultyObjective(Seq2SeqObjective):
    """The usual loss, but for what `fault` does when one of some samples comes by: each time, or once."""

    def __init__(self, fault: str, sample_numbers: Sequence[int], *, is_lasting: bool = True) -> None:
        super().__init__()
        self.fault, self.sample_numbers, self.is_lasting = fault, set(sample_numbers), is_lasting

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        found = self.sample_numbers & set(batch["sample_numbers"].flatten().tolist())
        if not found:
            return super().loss_sums(model, batch)
        if self.fault.startswith("flip") and torch.is_grad_enabled():
            self.sample_numbers -= found
            with torch.no_grad():
                is_trained = self.fault == "flip"
                weight = next(p for p in model.parameters() if p.requires_grad == is_trained and p.numel() > 9)
                weight.view(-1)[5:6].view(torch.int32).bitwise_xor_(1 << 20)
        sums = super().loss_sums(model, batch)
        if not self.is_lasting and torch.is_grad_enabled():
            self.sample_numbers -= found
        if self.fault == "gradient" and torch.is_grad_enabled():
            sums.whole.register_hook(lambda gradient: gradient * math.inf)
        factor = {"nan": math.nan, "inf": math.inf, "spike": 100.0}.get(self.fault, 1.0)
        return LossSums(sums.whole * factor, sums.by_group)


def train(
    run_dir: str | Path,
    *,
    fault: str = "none",
    sample_numbers: Sequence[int] = (),
    is_lasting: bool = True,
    stage: int | None = None,
    resume: str | None = None,
    on_rank: int | None = None,
    **settings: Any,
) -> None:
    """Trains with a fault on the rank that meets one of the samples, or on `on_rank` alone; ZeRO `stage`, or without DeepSpeed."""
    spikes = settings.pop("spikes", None)
    config = TrainingConfig(
        **{
            "steps": 6,
            "global_batch_rows": ROWS_PER_STEP,
            "micro_batch_rows": 1,
            "optimizer": AdamWConfig(learning_rate=3e-3),
            "save_every_steps": 1,
            "keep_checkpoints": 99,
            "deepspeed": None if stage is None else DeepSpeedConfig(zero_stage=stage, persistence_threshold_numel=50),  # type: ignore[arg-type]
            "spikes": None if spikes is None else SpikesConfig(**spikes),
            **settings,
        }
    )
    start(config)
    folder = Path(run_dir)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        model=build_model(
            SpadeT5ForConditionalGeneration, SpadeT5Config.from_preset("tiny", vocab_size=50, **SIZE), seed=0
        ),
        objective=FaultyObjective(fault, sample_numbers, is_lasting=is_lasting),
        train_rows=Rows(),
        eval_rows=None,
        config=config,
        run_dir=folder,
        facts={"config": {}},
    )
    if resume is not None:
        trainer.resume(Path(resume))
    trainer.fit()


def on_two_ranks(run_dir: Path, **arguments: Any) -> None:
    call_on_ranks(train_rank, {"run_dir": str(run_dir), **arguments}, num_ranks=2, log_dir=run_dir.parent / "ranks")


def train_rank(run_dir: str, **arguments: Any) -> None:
    train(run_dir, **arguments)
    distributed.shutdown()


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file."""
    files = sorted(path.glob("*.safetensors"))
    return {f"{file.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def assert_equal_tensors(path: Path, other: Path) -> None:
    """Weights, moments and everything else, bit for bit."""
    tensors, expected = read_tensors(path), read_tensors(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run_dir / "events.jsonl") if event["event"] == name]


def losses(run_dir: Path) -> list[float]:
    return [metrics["loss"] for metrics in read_metrics(run_dir)]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16_autocast"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    stage: int, precision: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    bad = 2 * ROWS_PER_STEP + 3  # in the last micro-batch of rank 1 in step 3
    arguments = {"fault": "nan", "sample_numbers": [bad], "stage": stage, "precision": precision}
    on_two_ranks(run_dir, **arguments)
    assert_equal_tensors(checkpoint(run_dir, 3), checkpoint(run_dir, 2))
    (event,) = events(run_dir, "skipped_step")
    assert (event["step"], event["ranks"], event["sample_numbers"]) == (3, [1], [bad])
    assert event["step_sample_numbers"] == [8, 9, 10, 11]
    assert [loss is None for loss in losses(run_dir)] == [False, False, True, False, False, False]
    assert read_state(checkpoint(run_dir, 6))["skipped_steps"] == [3]
    if (stage, precision) in ((1, "fp32"), (3, "bf16")):
        again = tmp_path / "again"
        on_two_ranks(again, resume=str(checkpoint(run_dir, 2)), **arguments)
        assert losses(again) == losses(run_dir)[2:]
        assert_equal_tensors(checkpoint(again, 6), checkpoint(run_dir, 6))


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
def test_one_process_skips_what_is_not_finite(fault: str, tmp_path: Path) -> None:
    train(tmp_path / "run", fault=fault, sample_numbers=[9])
    assert_equal_tensors(checkpoint(tmp_path / "run", 3), checkpoint(tmp_path / "run", 2))
    (event,) = events(tmp_path / "run", "skipped_step")
    expected = ("the gradient is not finite", []) if fault == "gradient" else (f"the loss is {fault}", [9])
    assert (event["reason"], event["sample_numbers"]) == expected
    assert event["step_sample_numbers"] == [8, 9, 10, 11]
    assert json.dumps(events(tmp_path / "run", "skipped_step"), allow_nan=False)


def test_a_gradient_that_overflows_on_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    on_two_ranks(run_dir, fault="gradient", sample_numbers=[9], stage=2)
    assert_equal_tensors(checkpoint(run_dir, 3), checkpoint(run_dir, 2))
    assert [event["reason"] for event in events(run_dir, "skipped_step")] == ["the gradient is not finite"]


def test_a_lasting_nan_ends_the_run_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    """From step 4 on every step is bad; the run was asked to save at each."""
    with pytest.raises(RunAbortedError, match="5 steps in a row were skipped up to step 8: the loss is nan") as caught:
        train(tmp_path / "run", fault="nan", sample_numbers=range(12, 99), steps=20)
    documented(str(caught.value))
    assert len(events(tmp_path / "run", "skipped_step")) == 5
    for path in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(tensor).all() for tensor in read_tensors(path).values())


def abort(run_dir: str, **arguments: Any) -> str:
    with pytest.raises(RunAbortedError) as caught:
        train(run_dir, **arguments)
    distributed.shutdown()
    return str(caught.value)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_lasting_nan_on_one_rank_ends_the_run_on_all(stage: int, tmp_path: Path) -> None:
    arguments = {
        "run_dir": str(tmp_path / "run"),
        "fault": "nan",
        "sample_numbers": list(range(13, 99, 4)),
        "steps": 20,
    }
    messages = call_on_ranks(abort, {**arguments, "stage": stage}, num_ranks=2, log_dir=tmp_path / "ranks")
    assert messages[0] == messages[1]
    assert messages[0].startswith("5 steps in a row were skipped up to step 8: the loss is nan")
    assert [event["ranks"] for event in events(tmp_path / "run", "skipped_step")] == [[1]] * 5


def test_the_count_of_skipped_steps_goes_on_after_a_resume(tmp_path: Path) -> None:
    arguments = {"fault": "nan", "sample_numbers": range(12, 99)}
    train(tmp_path / "run", steps=6, **arguments)  # 4, 5 and 6 are skipped
    with pytest.raises(RunAbortedError, match="5 steps in a row were skipped up to step 8"):
        train(tmp_path / "run", steps=20, resume=str(checkpoint(tmp_path / "run", 6)), **arguments)


class Breaking(Rows):
    """Breaks a value of the trainer while step 4 is being prepared."""

    trainer: Trainer
    where: str

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        if 12 in row_numbers:
            fragment = self.trainer.backend.fragments()[0]
            tensor = (
                fragment.flat
                if self.where == "weight"
                else self.trainer.backend.optimizer.state[fragment.flat][self.where]
            )
            with torch.no_grad():
                tensor.view(-1)[7] = math.nan
        return super().collate(row_numbers)


@pytest.mark.parametrize(("where", "last_good"), [("weight", 3), ("exp_avg_sq", 3)])
def test_values_that_are_not_finite_are_never_saved(
    where: str, last_good: int, make_trainer: Any, tmp_path: Path
) -> None:
    rows = Breaking()
    rows.where = where
    settings = {"steps": 20, "global_batch_rows": 4, "save_every_steps": 1, "keep_checkpoints": 99}
    rows.trainer = trainer = make_trainer(tmp_path / "run", train_rows=rows, **settings)
    with pytest.raises(SaveError, match="not finite") as caught:
        trainer.fit()
    documented(str(caught.value))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1] == checkpoint(tmp_path / "run", last_good)


SPIKES = {"window_steps": 8, "deviations": 6.0}


def test_a_spike_is_skipped(tmp_path: Path) -> None:
    """The loss of step 11 is a hundred times too large."""
    train(tmp_path / "run", fault="spike", sample_numbers=range(40, 44), steps=13, spikes=SPIKES)
    (event,) = events(tmp_path / "run", "spike")
    assert event["step"] == 11
    assert event["step_sample_numbers"] == [40, 41, 42, 43]
    assert_equal_tensors(checkpoint(tmp_path / "run", 11), checkpoint(tmp_path / "run", 10))
    assert max(losses(tmp_path / "run")) == losses(tmp_path / "run")[10]


def test_after_a_rollback_exactly_the_named_window_is_missing(tmp_path: Path) -> None:
    arguments = {"steps": 14, "save_every_steps": 4}
    train(tmp_path / "clean", **arguments)
    bad = {"fault": "spike", "sample_numbers": range(40, 44), "spikes": {**SPIKES, "action": "rollback"}, **arguments}
    train(tmp_path / "run", **bad)
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (11, 8)
    digests, clean = ([metrics["samples"] for metrics in read_metrics(tmp_path / name)] for name in ("run", "clean"))
    assert digests[:8] == clean[:8]
    assert digests[8:11] == clean[11:14]  # without the samples of steps 9 to 11
    assert not set(clean[8:11]) & set(digests)
    assert losses(tmp_path / "run")[-1] == pytest.approx(losses(tmp_path / "clean")[-1], rel=0.05)
    again = tmp_path / "again"
    train(again, resume=str(checkpoint(tmp_path / "run", 12)), **bad)
    assert losses(again) == losses(tmp_path / "run")[12:]


def test_without_a_checkpoint_a_spike_is_skipped_instead(tmp_path: Path) -> None:
    spikes = {**SPIKES, "action": "rollback"}
    settings = {"steps": 12, "save_every_steps": None, "spikes": spikes}
    train(tmp_path / "run", fault="spike", sample_numbers=range(40, 44), **settings)
    assert not events(tmp_path / "run", "rollback")
    assert len(events(tmp_path / "run", "spike")) == 1
    assert len(losses(tmp_path / "run")) == 12


def test_spikes_far_apart_without_a_checkpoint_do_not_end_the_run(tmp_path: Path) -> None:
    bad = [4 * step - 1 for step in range(11, 29, 3)]
    settings = {"steps": 30, "save_every_steps": None, "spikes": {**SPIKES, "action": "rollback"}}
    train(tmp_path / "run", fault="spike", sample_numbers=bad, **settings)
    assert len(events(tmp_path / "run", "spike")) == len(bad) == 6
    assert len(losses(tmp_path / "run")) == 30


def test_a_run_without_checkpoints_of_its_own_goes_back_to_where_it_began(tmp_path: Path) -> None:
    train(tmp_path / "first", steps=9)
    settings = {"steps": 20, "save_every_steps": None, "spikes": {**SPIKES, "window_steps": 5, "action": "rollback"}}
    train(
        tmp_path / "run", fault="spike", sample_numbers=[63], resume=str(checkpoint(tmp_path / "first", 9)), **settings
    )
    assert [(e["from_step"], e["to_step"]) for e in events(tmp_path / "run", "rollback")] == [(16, 9)]


def test_a_rollback_on_two_ranks_with_workers_and_an_average(tmp_path: Path) -> None:
    arguments = {"steps": 14, "save_every_steps": 4, "ema_decay": 0.9, "fault": "spike", "sample_numbers": [43]}
    arguments |= {"spikes": {**SPIKES, "action": "rollback"}}
    train(tmp_path / "alone", **arguments)
    on_two_ranks(tmp_path / "run", stage=2, loader_workers=1, **arguments)
    assert [event["to_step"] for event in events(tmp_path / "run", "rollback")] == [8]
    runs = [read_metrics(tmp_path / name) for name in ("run", "alone")]
    assert [m["samples"] for m in runs[0]] == [m["samples"] for m in runs[1]]
    assert [m["loss"] for m in runs[0]] == pytest.approx([m["loss"] for m in runs[1]], rel=1e-4)
    weights, expected = (read_weights(checkpoint(tmp_path / name, 14), is_averaged=True) for name in ("run", "alone"))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_spikes_without_end_end_the_run(tmp_path: Path) -> None:
    spikes = {**SPIKES, "action": "rollback"}
    settings = {"steps": 99, "save_every_steps": 4, "spikes": spikes}
    with pytest.raises(RunAbortedError, match=r"is a spike.*went back 5 times since the last checkpoint") as caught:
        train(tmp_path / "run", fault="spike", sample_numbers=range(40, 999), **settings)
    documented(str(caught.value))


@pytest.mark.parametrize(
    ("fault", "stage", "step", "found"),
    [("flip", 0, 5, 6), ("flip", 1, 4, 4), ("flip", 2, 4, 4), ("flip frozen", 1, 5, 6)],
)
def test_a_flipped_bit_in_a_copy_of_the_weights_is_found_and_undone(
    fault: str, stage: int, step: int, found: int, tmp_path: Path
) -> None:
    """On rank 1; copies are compared in even steps, weights were saved in step 3. At ZeRO 1 and 2 an update replaces all copies."""
    arguments = {"stage": stage, "steps": 8, "save_every_steps": 3}
    on_two_ranks(tmp_path / "clean", **arguments)
    settings = {"replica_check_every_steps": 2, **arguments}
    on_two_ranks(tmp_path / "run", fault=fault, sample_numbers=[(step - 1) * ROWS_PER_STEP + 1], **settings)
    (event,) = events(tmp_path / "run", "replicas_differ")
    # At stage 0, and where they do not train, two copies that differ have neither an owner nor a majority.
    has_owner = stage > 0 and fault == "flip"
    assert (event["step"], event["ranks"]) == (found, [1] if has_owner else [0, 1])
    assert [rollback["to_step"] for rollback in events(tmp_path / "run", "rollback")] == [3]
    assert losses(tmp_path / "run") == losses(tmp_path / "clean")
    assert_equal_tensors(checkpoint(tmp_path / "run", 8), checkpoint(tmp_path / "clean", 8))


def test_copies_are_compared_before_the_last_save_too(tmp_path: Path) -> None:
    settings = {"stage": 1, "steps": 5, "save_every_steps": 3, "replica_check_every_steps": 100}
    on_two_ranks(tmp_path / "run", fault="flip", sample_numbers=[4 * ROWS_PER_STEP + 1], **settings)
    assert [(e["step"], e["ranks"]) for e in events(tmp_path / "run", "replicas_differ")] == [(5, [1])]
    assert checkpoint(tmp_path / "run", 5).is_dir()

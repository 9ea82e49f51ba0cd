"""The engine on a very small model: what changes the loss, and what must not."""

import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spade_t5.checkpoint import list_checkpoints, read_state, read_weights
from spade_t5.checkpoint.request import request_checkpoint
from spade_t5.errors import StopRequestedError
from spade_t5.testing import documented
from spade_t5.training import distributed
from spade_t5.training.batch_warmup import BatchWarmupConfig
from spade_t5.training.data import Batch, NumberedRows
from spade_t5.training.engine import Trainer
from spade_t5.training.objectives import Seq2SeqObjective
from spade_t5.training.optimizers import AdafactorConfig, RMSScaledAdamWConfig, SGDConfig
from spade_t5.training.reporting import read_metrics
from spade_t5.training.schedules import CosineSchedule, InverseSqrtSchedule, LinearSchedule

MakeTrainer = Callable[..., Trainer]
DROPOUT = {"dropout_rate": 0.1}


def train_metrics(run_dir: Path, key: str) -> list[float]:
    return [metrics[key] for metrics in read_metrics(run_dir) if metrics["split"] == "train"]


def last_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_weights(list_checkpoints(run_dir / "checkpoints")[-1])


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Bit for bit: losses, gradient norms and final weights."""
    for key in ("loss", "grad_norm", "lr", "samples", "targets"):
        losses = train_metrics(run_dir, key)
        assert losses == train_metrics(other, key)[-len(losses) :]
    weights, expected = last_weights(run_dir), last_weights(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_loss_does_not_depend_on_accumulation(micro_batch_rows: int, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Six rows as 6 x 1, 3 x 2, or 4 and 2 with two empty rows: the numbers of one batch of six."""
    make_trainer(tmp_path / "whole", micro_batch_rows=6, clip_norm=0.5).fit()
    make_trainer(tmp_path / "parts", micro_batch_rows=micro_batch_rows, clip_norm=0.5).fit()
    assert train_metrics(tmp_path / "parts", "targets") == train_metrics(tmp_path / "whole", "targets")
    assert train_metrics(tmp_path / "parts", "tokens") == [72, 144, 216, 288]
    for key in ("loss", "grad_norm"):
        assert train_metrics(tmp_path / "parts", key) == pytest.approx(train_metrics(tmp_path / "whole", key), rel=1e-5)
    weights, expected = last_weights(tmp_path / "parts"), last_weights(tmp_path / "whole")
    for name, tensor in expected.items():
        assert (weights[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16_autocast"},
        {"loader_workers": 1},
        {"optimizer": RMSScaledAdamWConfig(), "schedule": CosineSchedule(warmup_steps=2), "ema_decay": 0.9},
        {"optimizer": AdafactorConfig(), "schedule": InverseSqrtSchedule(warmup_steps=2)},
        {"optimizer": SGDConfig(learning_rate=0.1, momentum=0.9), "schedule": LinearSchedule()},
    ],
    ids=["plain", "bf16_autocast", "worker", "rms-scaled-cosine-ema", "adafactor-inverse-sqrt", "momentum-linear"],
)
def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(
    settings: dict[str, Any], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    options = {"model": DROPOUT, "steps": 5, "save_every_steps": 2, "keep_checkpoints": 9, **settings}
    make_trainer(tmp_path / "unbroken", **options).fit()
    for step in (2, 4):
        resumed = make_trainer(tmp_path / f"from-{step}", **options)
        resumed.resume(tmp_path / "unbroken" / "checkpoints" / f"step-{step:08d}")
        resumed.fit()
        assert len(train_metrics(tmp_path / f"from-{step}", "loss")) == 5 - step
        assert_same_run(tmp_path / f"from-{step}", tmp_path / "unbroken")
    assert train_metrics(tmp_path / "from-2", "tokens") == train_metrics(tmp_path / "unbroken", "tokens")[2:]


def test_dropout_differs_between_steps_and_micro_batches(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class OneRow(NumberedRows):
        def collate(self, row_numbers: Sequence[int]) -> Batch:
            return {"input_ids": torch.full((1, 12), 7), "labels": torch.full((1, 4), 9)}

    still = SGDConfig(learning_rate=0.0)
    losses = []
    for seed in (0, 1):
        options = {"optimizer": still, "global_batch_rows": 1, "micro_batch_rows": 1, "seed": seed}
        make_trainer(tmp_path / f"{seed}", model={"dropout_rate": 0.3}, train_rows=OneRow(), **options).fit()
        losses += train_metrics(tmp_path / f"{seed}", "loss")
    assert len(set(losses)) == 8


def test_evaluation_is_the_loss_of_every_row_by_hand(
    make_trainer: MakeTrainer, random_rows: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", model={"dropout_rate": 0.5}, micro_batch_rows=3)
    loss, num_targets, loss_by = trainer.evaluate()
    model = trainer.backend.module.eval()
    total, count = 0.0, 0
    for row in range(7):
        batch = random_rows(7).collate([row])
        labels = batch["labels"][batch["labels"] != -100]
        decoder_input_ids = torch.cat([torch.tensor([0]), labels[:-1]])[None]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], decoder_input_ids=decoder_input_ids).logits[0]
        total -= float(F.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels].sum())
        count += len(labels)
    assert num_targets == count
    assert loss_by == {}
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_losses_of_groups_are_those_of_their_documents_alone(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Two documents a row: the first is short or long by turns, the second always short, and every third is of no group."""

    class PackedRows(NumberedRows):
        def __init__(self, num_rows: int | None, group: int | None = None) -> None:
            self.num_rows, self.group = num_rows, group

        def collate(self, row_numbers: Sequence[int]) -> Batch:
            ids = torch.stack(
                [torch.randint(2, 50, (32,), generator=torch.Generator().manual_seed(abs(n))) for n in row_numbers]
            )
            numbers = torch.tensor(row_numbers)
            documents = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]]).repeat(len(ids), 1)
            groups = torch.stack([numbers % 2, torch.where(numbers % 3 == 0, -1, 0)], dim=1)
            labels = ids[:, 12:20].clone()
            target_documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]]).repeat(len(ids), 1)
            group_of_label = groups.gather(1, (target_documents - 1).clamp(min=0))
            is_empty = (numbers == -1)[:, None]
            wanted = (group_of_label >= 0) if self.group is None else (group_of_label == self.group)
            return {
                "input_ids": ids[:, :12],
                "segment_ids": documents,
                "labels": labels.masked_fill(is_empty | (target_documents == 0) | ~wanted, -100),
                "decoder_input_ids": ids[:, 20:28],
                "decoder_segment_ids": target_documents,
                "loss_groups": groups.masked_fill(is_empty, -1),
                "sample_numbers": torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
            }

    groups = [{"length": "short", "all": "yes"}, {"length": "long", "all": "yes"}, {"length": "never"}]
    still = {"optimizer": SGDConfig(learning_rate=0.0), "steps": 1}
    options = {"train_rows": PackedRows(None), "eval_rows": PackedRows(7), **still}
    trainer = make_trainer(tmp_path / "run", objective=Seq2SeqObjective(groups=groups), **options)
    trainer.fit()
    alone = {}
    for group, label in enumerate(("short", "long")):
        source = {"train_rows": PackedRows(None, group), "eval_rows": PackedRows(7, group), **still}
        make_trainer(tmp_path / label, **source).fit()
        alone[label] = read_metrics(tmp_path / label)
    for i, metrics in enumerate(read_metrics(tmp_path / "run")):
        losses = {label: lines[i]["loss"] for label, lines in alone.items()}
        assert metrics["targets"] == sum(lines[i]["targets"] for lines in alone.values())
        assert metrics["loss_by"]["length"] == pytest.approx(losses, rel=1e-5)
        assert metrics["loss_by"]["all"] == {"yes": pytest.approx(metrics["loss"], rel=1e-6)}


def test_metrics(make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "spade_t5")
    make_trainer(tmp_path / "run", eval_every_steps=3).fit()
    metrics = read_metrics(tmp_path / "run")
    assert [(m["split"], m["step"]) for m in metrics] == [
        ("train", 1), ("train", 2), ("train", 3), ("validation", 3), ("train", 4), ("validation", 4),
    ]  # fmt: skip
    train, validation = metrics[0], metrics[3]
    assert set(train) == {
        "step", "split", "loss", "lr", "grad_norm", "targets", "tokens", "tokens_per_second", "targets_per_second",
        "padded_tokens_per_second", "padded_targets_per_second", "model_flops_per_second", "executed_flops_per_second",
        "mfu", "hfu", "seconds", "seconds_by", "memory", "samples",
    }  # fmt: skip
    assert set(validation) == {"step", "split", "loss", "targets"}
    assert train["tokens"] == 6 * 12
    assert train["tokens_per_second"] == pytest.approx(72 / train["seconds"])
    assert train["lr"] == 1e-2
    assert "step 4/4: loss" in (tmp_path / "run" / "log.txt").read_text()


def test_sigterm_saves_at_the_next_step_boundary(make_trainer: MakeTrainer, random_rows: Any, tmp_path: Path) -> None:
    class SignallingRows(random_rows):  # type: ignore[misc]
        """Signals the process in the middle of preparing step 2."""

        def collate(self, row_numbers: Sequence[int]) -> Batch:
            if 8 in row_numbers:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collate(row_numbers)

    before = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path / "unbroken", model=DROPOUT).fit()
    options = {"model": DROPOUT, "train_rows": SignallingRows()}
    with pytest.raises(StopRequestedError, match="stopped at step 2 on request"):
        make_trainer(tmp_path / "run", **options).fit()
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    assert len(train_metrics(tmp_path / "run", "loss")) == 2
    resumed = make_trainer(tmp_path / "run", model=DROPOUT)
    resumed.resume(tmp_path / "run" / "checkpoints" / "step-00000002")
    resumed.fit()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(("at_row", "step"), [(8, 2), (3, 2), (20, 4), (5, 4)])
def test_an_evaluation_that_a_stop_leaves_out_is_made_up_for(
    at_row: int, step: int, make_trainer: MakeTrainer, random_rows: Any, tmp_path: Path
) -> None:
    """The signal comes while row 8 or 20 of training is prepared, in steps 2 and 4, or while a held-out row is, in their evaluations."""

    class SignallingRows(random_rows):  # type: ignore[misc]
        is_armed = True

        def collate(self, row_numbers: Sequence[int]) -> Batch:
            is_due = at_row > 6 or len(train_metrics(tmp_path / "run", "loss")) == step
            if self.is_armed and at_row in row_numbers and is_due:
                self.is_armed = False
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collate(row_numbers)

    settings = {"eval_every_steps": 2, "keep_best": 1, "micro_batch_rows": 1}
    make_trainer(tmp_path / "unbroken", **settings).fit()
    rows, held_out = (SignallingRows(n) if (n is None) == (at_row > 6) else random_rows(n) for n in (None, 7))
    with pytest.raises(StopRequestedError, match=f"stopped at step {step} on request"):
        make_trainer(tmp_path / "run", train_rows=rows, eval_rows=held_out, **settings).fit()
    held_out_lines = [m["step"] for m in read_metrics(tmp_path / "run") if m["split"] == "validation"]
    assert held_out_lines == ([] if step == 2 else [2])
    resumed = make_trainer(tmp_path / "run", **settings)
    resumed.resume(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    resumed.fit()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    lines, expected = (
        [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name) if m["split"] == "validation"]
        for name in ("run", "unbroken")
    )
    assert lines == expected
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_state(last)["held_out_loss"] == expected[-1][1]
    assert not read_state(last)["evaluation_is_due"]


def test_a_checkpoint_is_made_when_one_is_asked_for(
    make_trainer: MakeTrainer, random_rows: Any, tmp_path: Path
) -> None:
    class AskingRows(random_rows):  # type: ignore[misc]
        """Asks while step 2 is being prepared."""

        def collate(self, row_numbers: Sequence[int]) -> Batch:
            if 8 in row_numbers:
                request_checkpoint(tmp_path / "run")
            return super().collate(row_numbers)

    make_trainer(tmp_path / "run", train_rows=AskingRows()).fit()
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000002", "step-00000004"]


def test_the_clock_stops_a_run(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(StopRequestedError, match="stopped at step 1 on request"):
        make_trainer(tmp_path / "run", max_wall_seconds=0.001).fit()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]


def test_averaged_weights_are_those_of_the_formula(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", ema_decay=0.5, save_every_steps=1, keep_checkpoints=9).fit()
    paths = list_checkpoints(tmp_path / "run" / "checkpoints")
    initial = dict(make_trainer(tmp_path / "fresh").backend.module.named_parameters())
    average = {name: tensor.detach().clone() for name, tensor in initial.items()}
    for path in paths:
        weights = read_weights(path)
        average = {name: 0.5 * tensor + 0.5 * weights[name] for name, tensor in average.items()}
        saved = read_weights(path, is_averaged=True)
        for name, tensor in average.items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(saved[name], weights[name]) for name in weights)


def test_held_out_loss_decides_which_checkpoints_stay(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings = {"steps": 8, "save_every_steps": 1, "eval_every_steps": 1, "keep_checkpoints": 1, "keep_best": 2}
    make_trainer(tmp_path / "run", optimizer=SGDConfig(learning_rate=1.0), **settings).fit()
    held_out = {m["step"]: m["loss"] for m in read_metrics(tmp_path / "run") if m["split"] == "validation"}
    best = sorted(held_out, key=held_out.__getitem__)[:2]
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == sorted({*best, 8})


def test_bf16_autocast_keeps_fp32_weights(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainers = {name: make_trainer(tmp_path / name, precision=name) for name in ("fp32", "bf16_autocast")}
    for trainer in trainers.values():
        trainer.fit()
    assert all(p.dtype == torch.float32 for p in trainers["bf16_autocast"].backend.module.parameters())
    exact, rounded = (train_metrics(tmp_path / name, "loss") for name in trainers)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)


def test_learning_rates_follow_schedule_and_group(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {"optimizer": SGDConfig(learning_rate=0.5), "schedule": LinearSchedule(final_factor=0.25)}
    trainer = make_trainer(tmp_path / "run", model={"ssm_training": "full"}, ssm_learning_rate=0.1, **options)
    trainer.fit()
    rates = [group["lr"] for group in trainer.backend.optimizer.param_groups]
    assert rates == [0.125, 0.125, pytest.approx(0.025)]
    assert train_metrics(tmp_path / "run", "lr") == pytest.approx([0.5 * (1 - 0.75 * s / 4) for s in (1, 2, 3, 4)])


def test_only_what_trains_changes(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    before = {name: p.clone() for name, p in trainer.backend.module.named_parameters()}
    trainer.fit()
    changed = {name for name, p in trainer.backend.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in trainer.backend.module.named_parameters() if p.requires_grad}
    assert any("global_mixer" in name for name in before.keys() - changed)


def test_ranks_without_rows_are_told_of(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for warmup in (None, BatchWarmupConfig(initial_rows=1, steps=2)):
        trainer = make_trainer(tmp_path / "run", batch_warmup=warmup)
        for num_ranks in (6, 8):
            with monkeypatch.context() as patch:
                patch.setattr(distributed, "world_size", lambda num_ranks=num_ranks: num_ranks)
                trainer._warn_of_idle_ranks()
        (message,) = (text for text in caplog.messages if "global_batch_rows" in text)
        assert "6 rows for 8 ranks: 2 of them compute nothing but padding in every step" in message
        documented(message)
        caplog.clear()

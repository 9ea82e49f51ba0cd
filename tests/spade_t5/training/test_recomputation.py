"""Activation checkpointing: every policy trains the same, bit for bit, at every ZeRO stage, and keeps less."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.testing.ranks import call_on_ranks
from spade_t5.testing.trainers import SIZE, tiny_trainer, train_metrics
from spade_t5.training import distributed
from spade_t5.training.config import DeepSpeedConfig
from spade_t5.training.recomputation import Recomputation, recompute

POLICIES: tuple[Recomputation, ...] = ("none", "selective", "full")


def train_with_every_policy(folder: str) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps, by stage and policy."""
    found = {}
    for stage in (0, 1, 2, 3):
        for policy in POLICIES:
            run_dir = Path(folder) / f"zero-{stage}-{policy}"
            tiny_trainer(
                run_dir,
                model={"dropout_rate": 0.1, "num_layers": 2, "ssm_training": "output"},
                steps=3,
                gradient_checkpointing=policy,
                deepspeed=DeepSpeedConfig(zero_stage=stage, persistence_threshold_numel=50),  # type: ignore[arg-type]
            ).fit()
            found[run_dir.name] = [*train_metrics(run_dir, "loss"), *train_metrics(run_dir, "grad_norm")]
    distributed.shutdown()
    return found


def test_training_is_the_same_at_every_stage(tmp_path: Path) -> None:
    found = call_on_ranks(
        train_with_every_policy, {"folder": str(tmp_path / "runs")}, num_ranks=2, log_dir=tmp_path / "logs"
    )[0]
    for stage in (0, 1, 2, 3):
        assert found[f"zero-{stage}-selective"] == found[f"zero-{stage}-none"]
        assert found[f"zero-{stage}-full"] == found[f"zero-{stage}-none"]


def run(policy: Recomputation) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and floating-point operations of the backward pass."""
    torch.manual_seed(0)
    config = SpadeT5Config.from_preset(
        "tiny", vocab_size=50, **{**SIZE, "num_layers": 2, "dropout_rate": 0.1}, global_layers=[0, 1]
    )
    model = SpadeT5ForConditionalGeneration(config).train()
    recompute(model, policy)
    ids = torch.randint(2, 50, (3, 40))
    with FlopCounterMode(display=False) as flops, torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids[:, :16]).loss
    forward = flops.get_total_flops()
    with FlopCounterMode(display=False) as flops:
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, flops.get_total_flops() - 2 * forward


def test_gradients_are_the_same_and_products_are_made_once_or_twice() -> None:
    loss, gradients, plain = run("none")
    extra = {}
    for policy in ("selective", "full"):
        other_loss, other_gradients, flops = run(policy)  # type: ignore[arg-type]
        assert torch.equal(other_loss, loss)
        assert other_gradients.keys() == gradients.keys()
        assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
        extra[policy] = flops - plain
    # what selective multiplies again is attention in blocks, no operator of its own on a CPU
    assert 0 < extra["selective"] < extra["full"] / 2


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.filterwarnings("error")
def test_nothing_warns(policy: Recomputation) -> None:
    model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", vocab_size=50, **SIZE)).train()
    recompute(model, policy)
    ids = torch.randint(2, 50, (1, 8))
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("value", [True, False])
def test_a_model_is_told_by_its_layers(value: bool, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "run", gradient_checkpointing=value)
    flags = [getattr(part, "gradient_checkpointing", None) for part in trainer.backend.module.modules()]
    assert flags.count(True) == (2 if value else 0)

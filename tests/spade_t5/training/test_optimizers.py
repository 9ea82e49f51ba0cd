"""RMS-scaled AdamW against its formula, whole and in pieces; parameter groups; stages that an optimizer refuses."""

import copy

import pytest
import torch
from torch import nn

from spade_t5.errors import ConfigError
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.optimizers import AdafactorConfig, Fragment, RMSScaledAdamW, SGDConfig, parameter_groups


def updated_by_formula(p: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """The docstring's formula, step by step in float64."""
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g.double() ** 2
        rms = max(1e-3, float(p.square().mean().sqrt()))
        update = rms * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
        p = p - lr * update - lr * decay * p
    return p


@pytest.mark.parametrize("size", [0.5, 1e-5])
def test_rms_scaled_adamw_follows_its_formula(size: float) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 5) * size)
    gradients = [torch.randn(3, 5) for _ in range(4)]
    expected = updated_by_formula(p.detach(), gradients, 0.02, 0.1)
    optimizer = RMSScaledAdamW([{"params": [p], "weight_decay": 0.1}], lr=0.02)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-9)


def test_rms_scaled_adamw_in_one_flat_tensor_of_two_parameters() -> None:
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5) * 0.01)]
    flat = nn.Parameter(torch.cat([copy.deepcopy(p).detach().flatten() for p in whole] + [torch.zeros(2)]))
    fragments = [
        Fragment(name="a", offset=0, numel=12, param_numel=12, flat=flat, start=0),
        Fragment(name="b", offset=0, numel=5, param_numel=5, flat=flat, start=12),
    ]
    separate, joined = RMSScaledAdamW(whole, lr=0.1), RMSScaledAdamW([flat], lr=0.1)
    joined.set_fragments(fragments, ["a", "b"])
    for _ in range(3):
        for p in whole:
            p.grad = torch.randn_like(p)
        flat.grad = torch.cat([p.grad.flatten() for p in whole if p.grad is not None] + [torch.zeros(2)])
        separate.step()
        joined.step()
    torch.testing.assert_close(flat.detach()[:17], torch.cat([p.detach().flatten() for p in whole]))


def test_parameter_groups() -> None:
    model = nn.Module()
    model.matrix = nn.Parameter(torch.zeros(2, 2))
    model.norm = nn.Parameter(torch.zeros(2))
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.ssm = nn.Parameter(torch.zeros(2, 2, 2))
    model.ssm._is_ssm = True
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, ssm_learning_rate=1e-3)
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(model.matrix)],
        [id(model.norm)],
        [id(model.ssm)],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0, pytest.approx(0.1)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adafactor_refuses_stages_that_shard(stage: int) -> None:
    with pytest.raises(ConfigError, match=f"adafactor needs whole parameters and cannot run at ZeRO stage {stage}"):
        TrainingConfig(
            steps=1,
            global_batch_rows=1,
            micro_batch_rows=1,
            optimizer=AdafactorConfig(),
            deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"clip_norm": -1.0}, "clip_norm: -1.0 must not be negative"),
        ({"precision": "bf16"}, "precision: bf16 keeps fp32 master weights"),
        ({"save_every_steps": 0}, "save_every_steps: 0 must be at least 1"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    values = {"steps": 1, "global_batch_rows": 1, "micro_batch_rows": 1, "optimizer": SGDConfig(learning_rate=1.0)}
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**values, **changes})  # type: ignore[arg-type]

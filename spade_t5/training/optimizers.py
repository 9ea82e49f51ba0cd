"""Optimizers, their configs and parameter groups.

Under ZeRO an optimizer sees flat pieces of many parameters. AdamW and SGD work element by element and do not mind. RMS-scaled AdamW needs
each parameter's root mean square: it learns from `set_fragments` which pieces belong to which parameter and adds up their squares over
the ranks. Adafactor needs rows and columns, so it runs only where parameters are whole (ZeRO stage 0 or one process).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spade_t5.errors import ConfigError
from spade_t5.training import distributed


@dataclass(frozen=True, slots=True)
class Fragment:
    """Where a run of elements of one parameter lies inside a tensor that the optimizer steps."""

    name: str
    """Name of the parameter in the model."""
    offset: int
    """First element, counted in the flattened parameter."""
    numel: int
    """Number of elements."""
    param_numel: int
    """Number of elements of the whole parameter."""
    flat: Tensor
    """The tensor that the optimizer steps (fp32): the parameter itself, or a flat partition of many."""
    start: int
    """First element, counted in the flattened `flat`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    """AdamW (arXiv:1711.05101)."""

    name: ClassVar[str] = "adamw"
    max_zero_stage: ClassVar[int] = 3
    num_moments: ClassVar[int] = 2
    learning_rate: float
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate; norms, biases and the SSM have none."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups made by `parameter_groups`."""
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class RMSScaledAdamWConfig:
    """AdamW whose rate is multiplied by each parameter's root mean square (nanoT5's AdamWScale)."""

    name: ClassVar[str] = "rms_scaled_adamw"
    max_zero_stage: ClassVar[int] = 3
    num_moments: ClassVar[int] = 2
    learning_rate: float = 2e-2
    """Peak learning rate, relative to the root mean square of each parameter."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups made by `parameter_groups`."""
        return RMSScaledAdamW(groups, lr=self.learning_rate, betas=(self.beta1, self.beta2), eps=self.epsilon)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdafactorConfig:
    """Adafactor with parameter scaling (arXiv:1804.04235), as T5 was trained: torch.optim.Adafactor."""

    name: ClassVar[str] = "adafactor"
    max_zero_stage: ClassVar[int] = 0
    num_moments: ClassVar[int] = 1  # at most: rows and columns are smaller
    learning_rate: float = 1e-2
    """Peak learning rate, relative to the root mean square of each parameter."""
    beta2_decay: float = -0.8
    """Exponent of the step in the decay of the second moment."""
    clipping_threshold: float = 1.0
    """Largest root mean square of an update before scaling."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, per unit of learning rate."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups made by `parameter_groups`."""
        return torch.optim.Adafactor(
            groups, lr=self.learning_rate, beta2_decay=self.beta2_decay, d=self.clipping_threshold
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SGDConfig:
    """Stochastic gradient descent with momentum."""

    name: ClassVar[str] = "sgd"
    max_zero_stage: ClassVar[int] = 3
    num_moments: ClassVar[int] = 1
    learning_rate: float
    """Peak learning rate."""
    momentum: float = 0.0
    """Decay of the running sum of gradients."""
    weight_decay: float = 0.0
    """Weight decay of matrices, added to the gradient."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups made by `parameter_groups`."""
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)


OptimizerConfig = AdamWConfig | RMSScaledAdamWConfig | AdafactorConfig | SGDConfig


def check_zero_stage(config: OptimizerConfig, zero_stage: int) -> None:
    """Refuses an optimizer that would see only pieces of parameters it needs whole.

    Raises:
        ConfigError: `zero_stage` is beyond what the optimizer accepts.
    """
    if zero_stage > config.max_zero_stage:
        raise ConfigError(
            f"training.optimizer.name: {config.name} needs whole parameters and cannot run at ZeRO stage {zero_stage}; "
            "set training.deepspeed.zero_stage=0 or use rms_scaled_adamw"
        )


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, ssm_learning_rate: float | None
) -> list[dict[str, Any]]:
    """Trained parameters in three groups: decayed matrices; norms and biases; state-space parameters.

    Each group carries `lr_scale`, the ratio of its peak rate to `learning_rate`. State-space parameters (marked `_is_ssm`) never decay.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    ssm: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if getattr(parameter, "_is_ssm", False):
            ssm.append(parameter)
        elif parameter.dim() >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    ssm_scale = 1.0 if ssm_learning_rate is None else ssm_learning_rate / learning_rate
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": ssm, "weight_decay": 0.0, "lr_scale": ssm_scale},
    ]
    return [group for group in groups if group["params"]]


class RMSScaledAdamW(torch.optim.Optimizer):
    """AdamW with a rate relative to the size of each parameter.

    p <- p - lr * max(1e-3, rms(p)) * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps) - lr * weight_decay * p

    The root mean square is that of the whole parameter, also where a rank holds only pieces of it (`set_fragments`).
    """

    smallest_rms = 1e-3

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        """Takes parameter groups as any torch optimizer; the hyperparameters are those of AdamW."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}
        self._param_numels: list[int] = []

    def set_fragments(self, fragments: Sequence[Fragment], names: Sequence[str]) -> None:
        """Tells which pieces of the stepped tensors belong to which parameter.

        Args:
            fragments: the pieces on this rank.
            names: every trained parameter of the model, in the same order on all ranks.
        """
        index = {name: i for i, name in enumerate(names)}
        self._param_numels = [1] * len(names)
        self._pieces = {}
        for fragment in fragments:
            i = index[fragment.name]
            self._param_numels[i] = fragment.param_numel
            self._pieces.setdefault(id(fragment.flat), []).append((i, fragment.start, fragment.numel))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every tensor that has a gradient."""
        tensors = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        scales = self._shared_scales(tensors) if self._pieces else None
        for group, p in tensors:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            step = float(state["step"])
            beta1, beta2 = group["betas"]
            assert p.grad is not None
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            update = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"])
            if scales is None:
                update.mul_(p.square().mean().sqrt_().clamp_(min=self.smallest_rms))
            else:
                for i, start, numel in self._pieces.get(id(p), []):
                    update.view(-1)[start : start + numel].mul_(scales[i])
            rate = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    def _shared_scales(self, tensors: list[tuple[dict[str, Any], Tensor]]) -> Tensor:
        """max(1e-3, rms) of every parameter that has a piece in this call, summed over the ranks."""
        device = tensors[0][1].device if tensors else torch.device("cpu")
        squares = torch.zeros(len(self._param_numels), device=device)
        for _, p in tensors:
            for i, start, numel in self._pieces.get(id(p), []):
                squares[i] += p.view(-1)[start : start + numel].square().sum()
        distributed.sum_over_ranks(squares)
        return (squares / torch.tensor(self._param_numels, device=device)).sqrt_().clamp_(min=self.smallest_rms)

"""What runs forward, backward and update: DeepSpeed (`deepspeed.py`), or plain PyTorch in one process (here).

The engine owns time and hands a backend losses that are already divided by the number of targets; a backend owns gradients and optimizer.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spade_t5.training import distributed
from spade_t5.training.config import TrainingConfig
from spade_t5.training.optimizers import Fragment, RMSScaledAdamW, parameter_groups


class Backend(Protocol):
    """One model with its optimizer on this rank."""

    model: nn.Module
    """What an objective calls."""
    module: nn.Module
    """The bare model, for names and configuration."""
    optimizer: torch.optim.Optimizer
    """The torch optimizer whose state is saved."""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different pieces of the optimizer state."""
        ...

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which an objective runs the model."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Adds the gradient of a micro-batch's share of the loss; `is_last` where the step has no more of them."""
        ...

    def step(self, learning_rate_factor: float) -> float:
        """Clips, updates and clears the gradients; returns their norm before clipping. Where it is not finite, nothing was updated."""
        ...

    def fragments(self) -> list[Fragment]:
        """The pieces of trained parameters that this rank's optimizer steps."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and averaged gradient of those pieces, between the last backward pass of a step and the step; none where there is no gradient."""
        ...

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters that do not train, and persistent buffers, whole and on the CPU (main rank only; empty elsewhere)."""
        ...

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts whole weights (all of them, fp32, on the CPU) into the module; the optimizer's own copies are not touched."""
        ...


class SingleProcess:
    """Plain PyTorch in one process; bf16_autocast through torch.autocast."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        """Moves `module` to this process's device and builds its optimizer."""
        self.device = distributed.device()
        self.module = module.to(self.device)
        self.model = self.module
        self.optimizer = build_optimizer(self.module, config)
        self._peak_rates = peak_rates(self.optimizer)
        self._clip_norm = config.clip_norm
        self._is_autocast = config.precision == "bf16_autocast"
        self._trained = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @property
    def is_sharded(self) -> bool:
        """One process holds everything."""
        return False

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bf16 where asked for."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._is_autocast)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Adds the gradient of a micro-batch's share of the loss."""
        loss.backward()

    def step(self, learning_rate_factor: float) -> float:
        """Clips, updates and clears the gradients; returns their norm before clipping. Where it is not finite, nothing was updated."""
        norm = clip_gradients([p for _, p in self._trained], self._clip_norm)
        if math.isfinite(norm):
            set_rates(self.optimizer, self._peak_rates, learning_rate_factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def fragments(self) -> list[Fragment]:
        """Every trained parameter, whole."""
        return whole_fragments(self._trained)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Whole gradients."""
        return whole_gradients(self._trained)

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters that do not train, and persistent buffers, on the CPU."""
        return frozen_tensors(self.module)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts whole weights into the module."""
        copy_weights(self.module, weights)


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the module's parameter groups."""
    return config.optimizer.build(
        parameter_groups(
            module,
            learning_rate=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            ssm_learning_rate=config.ssm_learning_rate,
        )
    )


def peak_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Peak learning rate of each parameter group."""
    return [group["lr"] * group["lr_scale"] for group in optimizer.param_groups]


def set_rates(optimizer: torch.optim.Optimizer, peaks: list[float], factor: float) -> None:
    """Sets each group's learning rate to its peak times the schedule's factor."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], clip_norm: float) -> float:
    """Norm of the whole gradient; gradients are scaled to `clip_norm` where they exceed it (0: never).

    The norm is summed in float64, as in ZeRO: over an embedding table, float32 sums are off by 1e-5.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if 0 < clip_norm < norm:
        torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
    return norm


def whole_fragments(parameters: list[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """Fragments of parameters that the optimizer steps as they are."""
    return [
        Fragment(name=name, offset=0, numel=p.numel(), param_numel=p.numel(), flat=p, start=0) for name, p in parameters
    ]


def whole_gradients(parameters: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Gradients that every rank has whole."""
    return ((name, p.grad) for name, p in parameters if p.grad is not None)


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that do not train, and of persistent buffers; aliases appear once."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in unique_state(module) if name not in trained}


def unique_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones under their first name only."""
    persistent = module.state_dict(keep_vars=True)
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


@torch.no_grad()
def copy_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies whole weights into the module's tensors, in place."""
    for name, tensor in unique_state(module):
        tensor.copy_(weights[name])


def share_fragments(optimizer: torch.optim.Optimizer, fragments: list[Fragment], module: nn.Module) -> None:
    """Tells an optimizer that needs whole parameters which pieces it holds."""
    if isinstance(optimizer, RMSScaledAdamW):
        optimizer.set_fragments(fragments, [name for name, p in module.named_parameters() if p.requires_grad])

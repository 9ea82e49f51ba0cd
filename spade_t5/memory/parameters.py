"""How many parameters a model has, by part and by optimizer group, told from shapes alone: no weight is drawn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from spade_t5.training.optimizers import parameter_groups

PARTS = ("embedding", "encoder", "state space", "decoder", "head")
"""Where a parameter may belong; norms and biases count with their stack, the classifier as a head."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a model."""

    name: str
    """In the model."""
    shape: tuple[int, ...]
    """As in the model."""
    is_trained: bool
    """Whether it gets a gradient."""
    part: str
    """One of `PARTS`."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """All tensors of a model, tied ones once."""

    of_model: tuple[Parameter, ...]
    """In the order of the model."""
    groups: tuple[tuple[Parameter, ...], ...]
    """Those that train, as the optimizer groups them."""

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """Those of a model, which may be on the meta device."""
        found = {
            id(parameter): Parameter(name, tuple(parameter.shape), parameter.requires_grad, _part(name, parameter))
            for name, parameter in model.named_parameters()
        }
        groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, ssm_learning_rate=None)
        return cls(
            of_model=tuple(found.values()),
            groups=tuple(tuple(found[id(parameter)] for parameter in group["params"]) for group in groups),
        )

    @property
    def trained(self) -> int:
        """Number of elements that train."""
        return total(one for one in self.of_model if one.is_trained)

    @property
    def frozen(self) -> int:
        """Number of elements that do not."""
        return total(one for one in self.of_model if not one.is_trained)

    def by_part(self) -> dict[str, tuple[int, int]]:
        """Elements that train and that do not, of every part that has some."""
        counts = {
            part: (
                total(one for one in self.of_model if one.part == part and one.is_trained),
                total(one for one in self.of_model if one.part == part and not one.is_trained),
            )
            for part in PARTS
        }
        return {part: count for part, count in counts.items() if any(count)}


def total(parameters: Iterable[Parameter]) -> int:
    """Number of elements of some parameters."""
    return sum(one.numel for one in parameters)


def _part(name: str, parameter: torch.nn.Parameter) -> str:
    if getattr(parameter, "_is_ssm", False):
        return "state space"
    if name.startswith("encoder.embed_tokens"):
        return "embedding"
    if name.startswith(("lm_head", "classification_head")):
        return "head"
    return "decoder" if name.startswith("decoder") else "encoder"

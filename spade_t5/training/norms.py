"""Norms of the gradient and of the weights, by part of the model.

Every rank adds up the squares of the pieces that its optimizer steps. Where the optimizer's state is sharded, no element is in the pieces
of two ranks, and one sum over the ranks gives the whole; otherwise every rank has the whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spade_t5.training import distributed
from spade_t5.training.backend import Backend

PartOf = Callable[[str], str]
"""Part of the model that a parameter belongs to, by its name."""


def first_word(name: str) -> str:
    """The module of the model that holds a parameter, for models that nobody knows more of.

    >>> first_word("encoder.layers.0.feed_forward.wo.weight")
    'encoder'
    """
    return name.partition(".")[0]


class PartNorms:
    """Norms of the parts of a model, behind the last backward pass of a step and before its update."""

    def __init__(self, backend: Backend, part_of: PartOf) -> None:
        """Sorts the trained parameters into parts."""
        self._backend = backend
        parts = {name: part_of(name) for name, p in backend.module.named_parameters() if p.requires_grad}
        self.names = sorted(set(parts.values()))
        self._row = {name: self.names.index(part) for name, part in parts.items()}

    @torch.no_grad()
    def measure(self) -> Tensor:
        """(2, parts) float64: norms of the averaged gradient before clipping, and of the weights that it was taken at; a collective call."""
        backend = self._backend
        squares = torch.zeros(2, len(self.names), dtype=torch.float64, device=distributed.device())
        for name, gradient in backend.gradients():
            squares[0, self._row[name]] += _square(gradient).to(squares.device)
        for fragment in backend.fragments():
            piece = fragment.flat.detach().view(-1)[fragment.start : fragment.start + fragment.numel]
            squares[1, self._row[fragment.name]] += _square(piece).to(squares.device)
        if backend.is_sharded:
            distributed.sum_over_ranks(squares)
        return squares.sqrt_()

    def as_metrics(self, norms: Tensor) -> dict[str, dict[str, float]]:
        """What `measure` returned, as fields of metrics.jsonl."""
        gradient, weight = norms.tolist()
        return {
            "grad_norm_by": dict(zip(self.names, gradient, strict=True)),
            "weight_norm_by": dict(zip(self.names, weight, strict=True)),
        }


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()

"""Ways to join the global branch G and the local branch Lc of a global layer.

The released SPADE uses `concat`; `add` and `stack` are in its code as alternatives; `gated` is ours. Each branch has a
norm of its own because the outputs of a state-space model and of attention differ in scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from spade_t5.layers.norm import make_norm
from spade_t5.layers.projection import Projection


class Fusion(nn.Module, ABC):
    """Base: (G, Lc) of shape (B, L, D) each -> (B, L, D)."""

    serial: ClassVar[bool] = False
    """The local branch reads the global branch's output instead of the layer's input."""

    @abstractmethod
    def forward(self, global_BLD: Tensor, local_BLD: Tensor) -> Tensor:
        """Joins the branches."""


class NormedFusion(Fusion):
    """Holds the norm of each branch."""

    def __init__(self, d_model: int, norm_type: str, eps: float) -> None:
        super().__init__()
        self.global_norm = make_norm(norm_type, d_model, eps)
        self.local_norm = make_norm(norm_type, d_model, eps)


class ConcatFusion(NormedFusion):
    """A = W [norm_g(G) ; norm_l(Lc)] + b, global half first."""

    def __init__(self, d_model: int, norm_type: str, eps: float) -> None:
        super().__init__(d_model, norm_type, eps)
        self.out = Projection(2 * d_model, d_model, std=(2 * d_model) ** -0.5, bias=True)

    def forward(self, global_BLD: Tensor, local_BLD: Tensor) -> Tensor:
        """Joins the branches."""
        return self.out(torch.cat([self.global_norm(global_BLD), self.local_norm(local_BLD)], dim=-1))


class AddFusion(NormedFusion):
    """A = (norm_g(G) + norm_l(Lc)) / 2."""

    def forward(self, global_BLD: Tensor, local_BLD: Tensor) -> Tensor:
        """Joins the branches."""
        return 0.5 * (self.global_norm(global_BLD) + self.local_norm(local_BLD))


class StackFusion(Fusion):
    """A = LocalAttn(S4(h)): one branch after the other, without norms between."""

    serial = True

    def __init__(self, d_model: int, norm_type: str, eps: float) -> None:
        super().__init__()

    def forward(self, global_BLD: Tensor, local_BLD: Tensor) -> Tensor:
        """The local branch has read the global one already."""
        return local_BLD


class GatedFusion(NormedFusion):
    """A = g * norm_g(G) + (1 - g) * norm_l(Lc) with g = sigmoid(W [norm_g(G) ; norm_l(Lc)] + b), per channel."""

    def __init__(self, d_model: int, norm_type: str, eps: float) -> None:
        super().__init__(d_model, norm_type, eps)
        self.gate = Projection(2 * d_model, d_model, std=(2 * d_model) ** -0.5, bias=True)

    def forward(self, global_BLD: Tensor, local_BLD: Tensor) -> Tensor:
        """Joins the branches."""
        global_BLD, local_BLD = self.global_norm(global_BLD), self.local_norm(local_BLD)
        gate_BLD = torch.sigmoid(self.gate(torch.cat([global_BLD, local_BLD], dim=-1)))
        # under autocast one branch may be in half precision and the other not
        dtype = torch.promote_types(local_BLD.dtype, global_BLD.dtype)
        return torch.lerp(local_BLD.to(dtype), global_BLD.to(dtype), gate_BLD.to(dtype))


FUSIONS: dict[str, Callable[[int, str, float], Fusion]] = {
    "concat": ConcatFusion,
    "add": AddFusion,
    "stack": StackFusion,
    "gated": GatedFusion,
}

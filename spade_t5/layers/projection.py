"""Linear map that knows the spread of its initial weights."""

import torch
from torch import Tensor, nn

from spade_t5.ops import linear


class Projection(nn.Linear):
    """`nn.Linear` whose weights start as N(0, std^2) and whose bias, if any, starts at 0.

    T5 has no 1/sqrt(d) in its attention and no scaled embeddings; the scales live in the initial weights instead, so
    each map is given its own `std`.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float, bias: bool = False) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial weights."""
        nn.init.normal_(self.weight, mean=0.0, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)

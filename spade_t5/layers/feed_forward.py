"""Position-wise feed-forward blocks."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from spade_t5.layers.projection import Projection
from spade_t5.ops import gated_gelu


class GatedFeedForward(nn.Module):
    """wo(dropout(gelu_tanh(wi_0 x) * wi_1 x)), the block of T5 1.1 (arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, dropout_rate: float, use_bias: bool) -> None:
        super().__init__()
        self.wi_0 = Projection(d_model, d_ff, std=d_model**-0.5, bias=use_bias)
        self.wi_1 = Projection(d_model, d_ff, std=d_model**-0.5, bias=use_bias)
        self.wo = Projection(d_ff, d_model, std=d_ff**-0.5, bias=use_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(self.dropout(gated_gelu(self.wi_0(x_BLD), self.wi_1(x_BLD))))


class ReluFeedForward(nn.Module):
    """wo(dropout(relu(wi x))), the block of the first T5 and of the released SPADE."""

    def __init__(self, d_model: int, d_ff: int, dropout_rate: float, use_bias: bool) -> None:
        super().__init__()
        self.wi = Projection(d_model, d_ff, std=d_model**-0.5, bias=use_bias)
        self.wo = Projection(d_ff, d_model, std=d_ff**-0.5, bias=use_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.wo(self.dropout(F.relu(self.wi(x_BLD))))


FEED_FORWARDS: dict[str, Callable[[int, int, float, bool], nn.Module]] = {
    "gated-gelu": GatedFeedForward,
    "relu": ReluFeedForward,
}

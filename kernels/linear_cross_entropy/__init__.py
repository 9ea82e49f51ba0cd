"""Cross-entropy of a vocabulary's logits, from the hidden states, without ever holding all logits."""

from spade_t5.kernels.linear_cross_entropy.naive import linear_cross_entropy_naive
from spade_t5.kernels.linear_cross_entropy.op import linear_cross_entropy, linear_cross_entropy_with_token_losses
from spade_t5.kernels.linear_cross_entropy.torch_chunked import linear_cross_entropy_chunked

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_chunked",
    "linear_cross_entropy_naive",
    "linear_cross_entropy_with_token_losses",
]

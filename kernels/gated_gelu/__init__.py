"""The gate of T5 1.1's feed-forward layer."""

from spade_t5.kernels.gated_gelu.naive import gated_gelu_naive
from spade_t5.kernels.gated_gelu.op import gated_gelu
from spade_t5.kernels.gated_gelu.torch_fused import gated_gelu_fused

__all__ = ["gated_gelu", "gated_gelu_fused", "gated_gelu_naive"]

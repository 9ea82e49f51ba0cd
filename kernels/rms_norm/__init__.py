"""T5's layer norm: root mean square, no mean, no shift."""

from spade_t5.kernels.rms_norm.naive import rms_norm_naive
from spade_t5.kernels.rms_norm.op import rms_norm
from spade_t5.kernels.rms_norm.torch_fused import rms_norm_fused

__all__ = ["rms_norm", "rms_norm_fused", "rms_norm_naive"]

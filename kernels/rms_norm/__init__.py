"""T5's layer norm: root mean square, no mean, no shift; alone, or with the residual sum and dropout before it."""

from spade_t5.kernels.rms_norm.add_op import add_rms_norm, add_rms_norm_with_transpose
from spade_t5.kernels.rms_norm.naive import add_rms_norm_naive, rms_norm_naive
from spade_t5.kernels.rms_norm.op import rms_norm, rms_norm_with_transpose
from spade_t5.kernels.rms_norm.torch_fused import add_rms_norm_fused, rms_norm_fused

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fused",
    "add_rms_norm_naive",
    "add_rms_norm_with_transpose",
    "rms_norm",
    "rms_norm_fused",
    "rms_norm_naive",
    "rms_norm_with_transpose",
]

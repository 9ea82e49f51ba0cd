"""Two-sided long convolution of a linear state-space model, restarted at every document of a packed row."""

from spade_t5.kernels.ssm_conv.naive import ssm_conv_naive
from spade_t5.kernels.ssm_conv.op import ssm_conv
from spade_t5.kernels.ssm_conv.torch_fft import kernel_spectrum, ssm_conv_fft

__all__ = ["kernel_spectrum", "ssm_conv", "ssm_conv_fft", "ssm_conv_naive"]

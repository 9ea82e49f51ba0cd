"""Two-sided long convolution of a linear state-space model, restarted at every document of a packed row.

`ssm_conv` takes the impulse response, `ssm_conv_chunked` the system itself cut into chunks.
"""

from spade_t5.kernels.ssm_conv.chunked_op import chunk_tokens, ssm_conv_chunked
from spade_t5.kernels.ssm_conv.naive import ssm_conv_naive
from spade_t5.kernels.ssm_conv.naive_chunked import impulse_response, ssm_conv_chunked_naive
from spade_t5.kernels.ssm_conv.op import ssm_conv
from spade_t5.kernels.ssm_conv.system import ChunkedSystem, chunked_system
from spade_t5.kernels.ssm_conv.torch_chunked import ssm_conv_chunked_torch
from spade_t5.kernels.ssm_conv.torch_fft import kernel_spectrum, ssm_conv_fft

__all__ = [
    "ChunkedSystem",
    "chunk_tokens",
    "chunked_system",
    "impulse_response",
    "kernel_spectrum",
    "ssm_conv",
    "ssm_conv_chunked",
    "ssm_conv_chunked_naive",
    "ssm_conv_chunked_torch",
    "ssm_conv_fft",
    "ssm_conv_naive",
]

"""The public `gated_gelu`: checks its arguments and hands them to a backend."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double
from spade_t5.kernels.gated_gelu.naive import gated_gelu_naive
from spade_t5.kernels.gated_gelu.torch_fused import gated_gelu_fused


def gated_gelu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU of one half gates the other (Shazeer, arXiv 2002.05202; the tanh form is T5 1.1's "gelu_new").

    h = gelu(a) * b,   gelu(a) = a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3)))

    Backward:   da = dh * b * gelu'(a),   db = dh * gelu(a).

    Args:
        a: gate (..., d_ff), of a floating dtype.
        b: values, same shape, dtype and device.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        tensor of the shape and dtype of `a`.

    Raises:
        ValueError: the arguments do not agree, or the backend is not available.
    """
    if not a.is_floating_point() or a.dim() == 0 or a.numel() == 0:
        raise ValueError(f"a is {a.dtype} of shape {tuple(a.shape)}; expected a non-empty floating tensor (..., d_ff)")
    if a.shape != b.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}; it must equal that of a, {tuple(a.shape)}")
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"b is {b.dtype} on {b.device}; it must be as a, {a.dtype} on {a.device}")
    chosen = choose_backend(backend, a.device)
    if chosen == "triton":
        from spade_t5.kernels.gated_gelu.triton_op import gated_gelu_triton

        refuse_double(a=a)
        return gated_gelu_triton(a, b)
    return (gated_gelu_naive if chosen == "naive" else gated_gelu_fused)(a, b)

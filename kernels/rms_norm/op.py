"""The public `rms_norm`: checks its arguments and hands them to a backend."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend
from spade_t5.kernels.rms_norm.naive import rms_norm_naive
from spade_t5.kernels.rms_norm.torch_fused import rms_norm_fused


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Divide every vector by its root mean square and scale its entries (T5; Zhang and Sennrich, arXiv 1910.07467).

    y = weight * (x * r),   r = rsqrt(mean(x^2) + eps)

    Statistics are in float32; the product with `weight` is taken after the cast back to the dtype of x, as in T5.

    Backward, with n = x r and g = weight dy:   dx = r (g - n mean(g n)),   dweight = sum over vectors of dy n.

    Args:
        x: (..., D) of a floating dtype.
        weight: (D,).
        eps: added to the mean square, in squared units of x.
        backend: "auto", "torch" or "naive".

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: shapes, devices or `eps` do not fit, or the backend is not available.
    """
    if not x.is_floating_point() or x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected a non-empty floating tensor (..., d_model)"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({x.shape[-1]},), the last dimension of x")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}; move it to {x.device}, where x is")
    if eps < 0.0:
        raise ValueError(f"eps={eps} is negative; T5 uses 1e-6")
    return (rms_norm_naive if choose_backend(backend, x.device) == "naive" else rms_norm_fused)(x, weight, eps)

"""The public `rms_norm` and `rms_norm_with_transpose`: they check their arguments and hand them to a backend."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double
from spade_t5.kernels.rms_norm.checks import check_has_positions, check_norm
from spade_t5.kernels.rms_norm.naive import rms_norm_naive
from spade_t5.kernels.rms_norm.torch_fused import rms_norm_fused


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Divide every vector by its root mean square and scale its entries (T5; Zhang and Sennrich, arXiv 1910.07467).

    y = weight * (x * r),   r = rsqrt(mean(x^2) + eps)

    Statistics are in float32; the product with `weight` is taken after the cast back to the dtype of x, as in T5.

    Backward, with n = x r and g = weight dy:   dx = r (g - n mean(g n)),   dweight = sum over vectors of dy n.

    Args:
        x: (..., D) of a floating dtype. Triton reads a (B, L, D) view of (B, D, L) memory in place and lays its
            gradient out likewise, up to 1,024 columns; wider rows it copies first.
        weight: (D,).
        eps: added to the mean square, in squared units of x.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        (..., D) in the dtype of `x`.

    Raises:
        ValueError: shapes, devices or `eps` do not fit, or the backend is not available.
    """
    check_norm(x, weight, eps)
    chosen = choose_backend(backend, x.device)
    if chosen == "triton":
        from spade_t5.kernels.rms_norm.triton_op import rms_norm_triton

        refuse_double(x=x, weight=weight)
        return rms_norm_triton(x, weight, eps)
    return (rms_norm_naive if chosen == "naive" else rms_norm_fused)(x, weight, eps)


def rms_norm_with_transpose(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`rms_norm` whose result is also laid out for the SSM convolution, which reads positions side by side.

    Args:
        x: (B, L, D) of a floating dtype.
        weight: as for `rms_norm`.
        eps: as for `rms_norm`.
        backend: as for `rms_norm`.

    Returns:
        y: (B, L, D), as of `rms_norm`.
        y_t: (B, L, D) with the same values. Triton returns a view of (B, D, L) memory, written in the same pass; the
            other backends return `y` itself, as their SSM convolution has no layout of its own.

    Raises:
        ValueError: as `rms_norm`, or `x` has no positions.
    """
    check_norm(x, weight, eps)
    check_has_positions(x)
    chosen = choose_backend(backend, x.device)
    if chosen == "triton":
        from spade_t5.kernels.rms_norm.triton_op import rms_norm_with_transpose_triton

        refuse_double(x=x, weight=weight)
        return rms_norm_with_transpose_triton(x, weight, eps)
    y = (rms_norm_naive if chosen == "naive" else rms_norm_fused)(x, weight, eps)
    return y, y

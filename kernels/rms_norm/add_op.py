"""The public `add_rms_norm` and `add_rms_norm_with_transpose`: a residual sum and the norm that reads it."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double
from spade_t5.kernels.rms_norm.checks import check_has_positions, check_norm, check_residual
from spade_t5.kernels.rms_norm.naive import add_rms_norm_naive
from spade_t5.kernels.rms_norm.torch_fused import add_rms_norm_fused


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, dropout_p: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum for the next branch, in one pass over memory.

    r = residual + Z x,   y = weight * (r s),   s = rsqrt(mean(r^2) + eps)

    Z is the dropout mask times 1 / (1 - dropout_p). Statistics are in float32 and taken of r as it is returned; the
    product with `weight` is taken after the cast back to the dtype of r, as in T5.

    Backward, with n = r s and h = weight dy:   g = s (h - n mean(h n)) + dr,   dresidual = g,   dx = Z g,
    dweight = sum over vectors of dy n.

    Args:
        x: output of a branch (..., D), of a floating dtype.
        residual: the stream (..., D); its dtype may be wider than that of `x`, as under autocast.
        weight: (D,).
        eps: added to the mean square, in squared units of r.
        dropout_p: probability of dropping an entry of `x`; 0 outside of training.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        r: (..., D), the new stream, in the dtype that PyTorch gives to residual + x.
        y: (..., D), its norm, in the dtype of r.

    Raises:
        ValueError: shapes, dtypes, devices, `eps` or `dropout_p` do not fit, or the backend is not available.
    """
    check_norm(x, weight, eps)
    check_residual(x, residual, dropout_p)
    chosen = choose_backend(backend, x.device)
    if chosen == "triton":
        from spade_t5.kernels.rms_norm.triton_op import add_rms_norm_triton

        refuse_double(x=x, residual=residual, weight=weight)
        return add_rms_norm_triton(x, residual, weight, eps, dropout_p)
    return (add_rms_norm_naive if chosen == "naive" else add_rms_norm_fused)(x, residual, weight, eps, dropout_p)


def add_rms_norm_with_transpose(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, dropout_p: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` whose norm is also laid out for the SSM convolution, as `rms_norm_with_transpose` does.

    Args:
        x: (B, L, D); otherwise as for `add_rms_norm`.
        residual: as for `add_rms_norm`.
        weight: as for `add_rms_norm`.
        eps: as for `add_rms_norm`.
        dropout_p: as for `add_rms_norm`.
        backend: as for `add_rms_norm`.

    Returns:
        r: as of `add_rms_norm`.
        y: as of `add_rms_norm`.
        y_t: (B, L, D) with the values of y; a view of (B, D, L) memory from Triton, `y` itself from other backends.

    Raises:
        ValueError: as `add_rms_norm`, or `x` has no positions.
    """
    check_norm(x, weight, eps)
    check_residual(x, residual, dropout_p)
    check_has_positions(x)
    chosen = choose_backend(backend, x.device)
    if chosen == "triton":
        from spade_t5.kernels.rms_norm.triton_op import add_rms_norm_with_transpose_triton

        refuse_double(x=x, residual=residual, weight=weight)
        return add_rms_norm_with_transpose_triton(x, residual, weight, eps, dropout_p)
    r, y = (add_rms_norm_naive if chosen == "naive" else add_rms_norm_fused)(x, residual, weight, eps, dropout_p)
    return r, y, y

"""What all functions of this op require of their arguments."""

from torch import Tensor


def check_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    """Raise ValueError unless `x` (..., D), `weight` (D,) and `eps` fit together."""
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


def check_residual(x: Tensor, residual: Tensor, dropout_p: float) -> None:
    """Raise ValueError unless `residual` can be added to `x` and `dropout_p` is a probability below 1."""
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must equal that of x, {tuple(x.shape)}")
    if not residual.is_floating_point():
        raise ValueError(f"residual is {residual.dtype}; expected a floating dtype")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}; move it to {x.device}, where x is")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p} is not a probability below 1")


def check_has_positions(x: Tensor) -> None:
    """Raise ValueError unless `x` is (B, L, D), which a result laid out as (B, D, L) needs."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; a transposed result needs (B, L, d_model)")

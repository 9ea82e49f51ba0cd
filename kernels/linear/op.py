"""The public `linear`: checks its arguments and hands them to a backend."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend
from spade_t5.kernels.linear.naive import linear_naive
from spade_t5.kernels.linear.torch_onednn import linear_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Linear map y = x weight' + bias, as `torch.nn.functional.linear`.

    Backward:   dx = dy weight,   dweight = dy' x,   dbias = sum over rows of dy.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        backend: "auto", "torch" or "naive".

    Returns:
        (..., out_features).

    Raises:
        ValueError: shapes do not fit, or the backend is not available.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs (out, {x.shape[-1]})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},), the first dimension of weight"
        )
    return (linear_naive if choose_backend(backend, x.device) == "naive" else linear_onednn)(x, weight, bias)

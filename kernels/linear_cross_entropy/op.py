"""The public `linear_cross_entropy`: checks its arguments and hands them to a backend."""

import torch
from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double, traced
from spade_t5.kernels.linear_cross_entropy.naive import linear_cross_entropy_naive
from spade_t5.kernels.linear_cross_entropy.terms import LossTerms
from spade_t5.kernels.linear_cross_entropy.torch_chunked import linear_cross_entropy_chunked


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Summed cross-entropy of labels under softmax(x weight'), from the hidden states, in memory of a few rows' logits.

    With z = weight x of one row, y its label, V entries and lse = log sum_v exp(z_v), the row's loss is

        (1 - s) (lse - z_y) + s mean_v(lse - z_v) + c lse^2

    s is `label_smoothing` (Szegedy et al., arXiv 1512.00567, as in torch.nn.functional.cross_entropy), c is `z_loss`
    (Mesh TensorFlow's and t5x's z-loss, which keeps lse near 0 so that low precision represents the logits).

    Backward:   dz_v = p_v (1 + 2 c lse) - (1 - s) [v = y] - s / V,   dx = dz weight,   dweight = sum over rows of dz x'.
    All of it happens in the forward pass, chunk by chunk, since dz needs the logits; between the passes only dx and
    dweight are kept, and the backward pass multiplies them by the incoming scalar.

    Under autocast the matrix products take its dtype, as `torch.nn.functional.linear` would; the softmax and the loss
    are in float32 always, and dweight is summed over chunks in float32.

    Args:
        x: hidden states (..., D), of a floating dtype.
        weight: (V, D), of the dtype of `x` (of any floating dtype under autocast).
        labels: integers (...), each in [0, V) or `ignore_index`. Another value is an error on a CPU; on a GPU, where
            looking would stall the queue, it makes the loss NaN.
        z_loss: coefficient c; 1e-4 in Mesh TensorFlow and t5x.
        label_smoothing: s, in [0, 1].
        ignore_index: label of rows that add nothing to the loss and have no gradient.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        scalar, the sum over the labels that are not ignored; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices or values do not fit, or the backend is not available.
    """
    loss, _ = linear_cross_entropy_with_token_losses(
        x,
        weight,
        labels,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        backend=backend,
    )
    return loss


def linear_cross_entropy_with_token_losses(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same, and the losses that the sum consists of, which the op has anyway.

    Returns:
        the sum as from `linear_cross_entropy`, and the loss of each label: (...) as `labels`, in the same dtype, 0 where a
        label is ignored, without a gradient.
    """
    _check(x, weight, labels)
    if z_loss < 0.0:
        raise ValueError(f"z_loss={z_loss} is negative; use 0 to leave the term out")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1]")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and traced() is None:
        _check_range(labels, weight.shape[0], ignore_index)
    terms = LossTerms(z_loss=z_loss, label_smoothing=label_smoothing, ignore_index=ignore_index)
    chosen = choose_backend(backend, x.device)
    labels = labels.long()
    if chosen == "triton":
        from spade_t5.kernels.linear_cross_entropy.triton_op import linear_cross_entropy_triton

        refuse_double(x=x, weight=weight)
        return linear_cross_entropy_triton(x, weight, labels, terms)
    if chosen == "naive":
        return linear_cross_entropy_naive(x, weight, labels, terms)
    return linear_cross_entropy_chunked(x, weight, labels, terms)


def _check(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    if not x.is_floating_point() or x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; expected a non-empty floating tensor (..., d_model)"
        )
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (vocab_size, {x.shape[-1]}), as x ends")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(x.shape[:-1])}, x but for its last")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels is {labels.dtype}; expected integers")
    if weight.device != x.device or labels.device != x.device:
        raise ValueError(f"weight is on {weight.device} and labels on {labels.device}; move both to {x.device}, as x")
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"weight is {weight.dtype} and x is {x.dtype}; cast one, or use torch.autocast")


def _check_range(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    counted = labels.masked_fill(labels == ignore_index, 0)
    lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"labels holds {lowest if lowest < 0 else highest}; expected [0, {vocab_size}) or ignore_index={ignore_index}"
        )

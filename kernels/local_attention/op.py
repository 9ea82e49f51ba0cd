"""The public `local_attention`: checks its arguments and hands them to a backend.

Shapes: B batch, L length, H heads, K d_kv, D the largest relative offset with a bias of its own.
"""

import torch
from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double
from spade_t5.kernels.local_attention.naive import local_attention_naive
from spade_t5.kernels.local_attention.torch_blocked import local_attention_blocked
from spade_t5.kernels.segments import check_segment_ids

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset_bias: Tensor | None,
    *,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to the keys around it, with a bias that depends on the relative offset (T5, LongT5).

    S_ij = q_i . k_j + b_h[clamp(j - i, -D, D)]   for -left <= j - i <= right and seg_i = seg_j,   O = softmax(S) V

    There is no 1/sqrt(d): T5 folds it into the initialisation. Backward, with P the softmax and dO the gradient of O:
    dV = P' dO,  dS = P * (dO V' - rowsum(P * dO V')),  dQ = dS K,  dK = dS' Q,  db_h[o] = sum_{b,i} dS_{i,i+o}.

    Args:
        q: queries (B, L, H, K); float32, float64, bfloat16 or float16.
        k: keys, same shape, dtype and device.
        v: values, same shape, dtype and device.
        offset_bias: (H, 2D + 1), float32 (float64 with float64 queries): entry [h, D + o] is the bias of key i + o for
            query i; offsets beyond D take the end entries. None: no bias.
        left: keys visible before the query, in tokens; None: unlimited.
        right: keys visible after the query, in tokens; None: unlimited.
        segment_ids: (B, L) int64, 0 = padding, 1, 2, ... = document within the row; a token attends to its own document
            only. Ids do not decrease along a row, but for padding, which may stand anywhere. None: every row is one
            document.
        dropout_p: probability with which an attention weight is dropped.
        backend: "auto", "triton" (d_kv of 16, 32, 64 or 128, no float64), "torch" or "naive".

    Returns:
        (B, L, H, K) in the dtype of `q`; 0 at padding, where all gradients are 0 too.

    Raises:
        ValueError: a shape, dtype, device, window or probability is wrong, or the backend is not available.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected a non-empty (batch, length, heads, d_kv)")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; cast it to one of {', '.join(str(dtype) for dtype in _DTYPES)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must equal that of q, {tuple(q.shape)} (equal lengths only)"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be as q, {q.dtype} on {q.device}")
    for name, reach in (("left", left), ("right", right)):
        if reach is not None and reach < 0:
            raise ValueError(f"{name}={reach} is negative; give a number of tokens >= 0, or None for no limit")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p} is outside [0, 1); give a probability")
    if offset_bias is not None:
        _check_offset_bias(offset_bias, q)
    if segment_ids is not None:
        check_segment_ids(segment_ids, q)

    chosen = choose_backend(backend, q.device)
    if chosen == "triton":
        from spade_t5.kernels.local_attention.triton_op import local_attention_triton

        refuse_double(q=q, **({} if offset_bias is None else {"offset_bias": offset_bias}))
        return local_attention_triton(q, k, v, offset_bias, left, right, segment_ids, dropout_p)
    implementation = local_attention_naive if chosen == "naive" else local_attention_blocked
    return implementation(q, k, v, offset_bias, left, right, segment_ids, dropout_p)


def _check_offset_bias(offset_bias: Tensor, q: Tensor) -> None:
    num_heads = q.shape[2]
    if offset_bias.dim() != 2 or offset_bias.shape[0] != num_heads or offset_bias.shape[1] % 2 == 0:
        raise ValueError(
            f"offset_bias has shape {tuple(offset_bias.shape)}; expected ({num_heads}, 2D + 1), one odd row per head"
        )
    if offset_bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"offset_bias has dtype {offset_bias.dtype}; keep it in float32, as it is added to float32 scores"
        )
    if offset_bias.device != q.device:
        raise ValueError(f"offset_bias is on {offset_bias.device}; move it to {q.device}, where q is")

"""Local attention with dense (B, H, L, L) scores: the reference of every backend, and the source of attention maps.

Memory grows with the square of the length. Shapes: B batch, L length, H heads, K d_kv, D the largest offset with its
own bias.
"""

import torch
from torch import Tensor


def local_attention_naive(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(S) V with S as in `local_attention`; arguments and result as there, unchecked."""
    with torch.autocast(q_BLHK.device.type, enabled=False):
        probabilities_BHLL = local_attention_probabilities(q_BLHK, k_BLHK, offset_bias, left, right, segment_ids)
        weights_BHLL = torch.dropout(probabilities_BHLL, dropout_p, train=True)
        o_BLHK = torch.einsum("bhij,bjhk->bihk", weights_BHLL, v_BLHK.to(weights_BHLL.dtype))
    return o_BLHK.to(q_BLHK.dtype)


def local_attention_probabilities(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """softmax(S) before dropout, for looking at it.

    Args: as of `local_attention`.

    Returns:
        (B, H, L, L), float32 (float64 for float64 queries); exactly 0 outside the window and the document, and in the
        rows of padding.
    """
    length = q_BLHK.shape[1]
    dtype = torch.promote_types(q_BLHK.dtype, torch.float32)
    positions = torch.arange(length, device=q_BLHK.device)
    offsets_LL = positions[None, :] - positions[:, None]
    is_visible_LL = torch.ones_like(offsets_LL, dtype=torch.bool)
    if left is not None:
        is_visible_LL &= offsets_LL >= -left
    if right is not None:
        is_visible_LL &= offsets_LL <= right
    is_visible = is_visible_LL[None, None]
    if segment_ids is not None:
        is_same_document = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
        is_visible = is_visible & is_same_document[:, None]

    with torch.autocast(q_BLHK.device.type, enabled=False):
        scores = torch.einsum("bihk,bjhk->bhij", q_BLHK.to(dtype), k_BLHK.to(dtype))
        if offset_bias is not None:
            max_offset = offset_bias.shape[1] // 2
            scores = scores + offset_bias.to(dtype)[:, offsets_LL.clamp(-max_offset, max_offset) + max_offset]
        # A finite fill keeps the rows of padding, which see no key at all, free of NaN in both directions.
        probabilities = scores.masked_fill(~is_visible, torch.finfo(dtype).min).softmax(dim=-1)
    return probabilities.masked_fill(~is_visible, 0.0)

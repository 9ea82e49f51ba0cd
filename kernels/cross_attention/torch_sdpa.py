"""Cross-attention by torch's `scaled_dot_product_attention`, with a mask where some keys are hidden.

Shapes: B batch, T queries, L keys, H heads, K d_kv.
"""

import torch.nn.functional as F
from torch import Tensor


def cross_attention_sdpa(
    q_BTHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, is_visible: Tensor | None, dropout_p: float
) -> Tensor:
    """O = softmax(Q K') V over the visible keys; arguments and result as of `cross_attention`, unchecked."""
    mask = has_keys = None
    if is_visible is not None:
        is_visible = is_visible[:, None]
        # softmax over nothing is NaN: such rows look everywhere and their output is set to 0
        has_keys = is_visible.any(dim=-1, keepdim=True)
        mask = is_visible | ~has_keys
    q_BHTK, k_BHLK, v_BHLK = (x.transpose(1, 2) for x in (q_BTHK, k_BLHK, v_BLHK))
    o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHLK, v_BHLK, attn_mask=mask, dropout_p=dropout_p, scale=1.0)
    return (o_BHTK if has_keys is None else o_BHTK * has_keys).transpose(1, 2)

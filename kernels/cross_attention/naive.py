"""Cross-attention with dense scores in float32 at least: the reference of the other paths, and the source of weights.

Shapes: B batch, T queries, L keys, H heads, K d_kv.
"""

import torch
from torch import Tensor


def visible_keys(query_documents_BT: Tensor | None, key_documents_BL: Tensor | None) -> Tensor | None:
    """Which keys each query sees, bool (B, T or 1, L); None: all of them. Arguments as of `cross_attention`."""
    if key_documents_BL is None:
        return None
    is_key_B1L = (key_documents_BL != 0)[:, None, :]
    if query_documents_BT is None:
        return is_key_B1L
    return is_key_B1L & (query_documents_BT[:, :, None] == key_documents_BL[:, None, :])


def cross_attention_probabilities(q_BTHK: Tensor, k_BLHK: Tensor, is_visible: Tensor | None) -> Tensor:
    """softmax(Q K') (B, H, T, L) in float32 at least, before dropout; 0 wherever a key is not seen, whole rows included."""
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        scores_BHTL = torch.einsum("bthk,blhk->bhtl", q_BTHK.to(dtype), k_BLHK.to(dtype))
    if is_visible is None:
        return scores_BHTL.softmax(dim=-1)
    is_hidden = ~is_visible[:, None]
    return scores_BHTL.masked_fill(is_hidden, torch.finfo(dtype).min).softmax(dim=-1).masked_fill(is_hidden, 0.0)


def cross_attention_naive(
    q_BTHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, is_visible: Tensor | None, dropout_p: float = 0.0
) -> Tensor:
    """O = softmax(Q K') V over the visible keys; arguments and result as of `cross_attention`, unchecked."""
    with torch.autocast(q_BTHK.device.type, enabled=False):
        weights_BHTL = cross_attention_probabilities(q_BTHK, k_BLHK, is_visible)
        weights_BHTL = torch.dropout(weights_BHTL, dropout_p, train=True)
        return torch.einsum("bhtl,blhk->bthk", weights_BHTL, v_BLHK.to(weights_BHTL.dtype)).to(q_BTHK.dtype)

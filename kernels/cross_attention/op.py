"""The public `cross_attention`: checks its arguments and hands them to a path."""

from torch import Tensor

from spade_t5.kernels.backend import choose_backend
from spade_t5.kernels.cross_attention.naive import cross_attention_naive, visible_keys
from spade_t5.kernels.cross_attention.per_document import (
    DocumentPairs,
    can_pair_documents,
    cross_attention_per_document,
)
from spade_t5.kernels.cross_attention.torch_sdpa import cross_attention_sdpa


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    pairs: DocumentPairs | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of every target token to the source tokens of its document (T5: no 1/sqrt(d), no position bias).

    S_ij = q_i . k_j   for keys of the query's document,   O = softmax(S) V

    Backward, with P the softmax and dO the gradient of O: dV = P' dO,  dS = P * (dO V' - rowsum(P * dO V')),
    dQ = dS K,  dK = dS' Q. All backends but "naive" are torch's own attention: with `pairs` document by document
    (FlashAttention on a GPU), without them `scaled_dot_product_attention`, with a dense mask where ids are given.

    Args:
        q: queries (B, T, H, K).
        k: keys (B, L, H, K), same dtype and device.
        v: values, as the keys.
        query_documents: (B, T) int64, 0 = padding, 1, 2, ... = document within the row; None: every query sees every
            key that is no padding.
        key_documents: (B, L), likewise; None: no key is hidden.
        pairs: `pair_documents(query_documents, key_documents, T)`, made once for many calls.
        dropout_p: probability with which an attention weight is dropped.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        (B, T, H, K) in the dtype of `q`; 0 for a query that sees no key.

    Raises:
        ValueError: a shape, dtype, device or probability is wrong, or the backend is not available.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected a non-empty (batch, targets, heads, d_kv)")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.shape[2:] != q.shape[2:] or x.shape != k.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected ({q.shape[0]}, sources, {q.shape[2]}, {q.shape[3]}), k and v alike"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be as q, {q.dtype} on {q.device}")
    for name, ids, expected in (
        ("query_documents", query_documents, q.shape[:2]),
        ("key_documents", key_documents, k.shape[:2]),
    ):
        if ids is not None and ids.shape != expected:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected {tuple(expected)}, one id a token")
    if query_documents is not None and key_documents is None:
        raise ValueError("key_documents is missing; query_documents need the documents of the keys")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p} is outside [0, 1); give a probability")

    if choose_backend(backend, q.device) == "naive":
        return cross_attention_naive(q, k, v, visible_keys(query_documents, key_documents), dropout_p)
    # Where no query sees a key, nothing would tie the output to keys and values, whose projections need a gradient, of
    # zeros, on every rank alike (ZeRO 3 waits for it).
    if pairs is not None and pairs.num_scores > 0 and can_pair_documents(q.dtype, q.shape[3], dropout_p, q.device):
        return cross_attention_per_document(q, k, v, pairs, dropout_p)
    return cross_attention_sdpa(q, k, v, visible_keys(query_documents, key_documents), dropout_p)

"""Cross-attention of packed or padded rows, document by document: work is sum of T_d L_d instead of B T L.

The tokens of all documents are laid end to end, padding left out, and every target document attends to its own source
document: on a GPU by torch's `varlen_attn` (FlashAttention), on a CPU by one `scaled_dot_product_attention` a document.

Shapes: B batch, T queries, L keys, H heads, K d_kv, P queries of all documents, S keys of all documents, N documents.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured on one core of an AMD EPYC, four heads of 64, both passes: a call for one document takes 130 us besides its
# scores, a score of a dense mask 45 ns.
_SCORES_OF_A_CALL = 3000


@dataclass(frozen=True)
class DocumentPairs:
    """Where the tokens of each target document and of its source document are."""

    queries_P: Tensor
    """Positions in the flattened (B T) targets, int64, document after document."""
    keys_S: Tensor
    """Positions in the flattened (B L) sources, in the same order of documents."""
    query_ends_N1: Tensor
    """First query of each document among the P, and P at the end: int32 (N + 1,)."""
    key_ends_N1: Tensor
    """First key of each document among the S, and S at the end: int32 (N + 1,)."""
    max_queries: int
    """Length of the longest target document."""
    max_keys: int
    """Length of the longest source document."""
    num_scores: int
    """Sum over documents of queries times keys; 0: no target document has a source."""
    num_dense_scores: int
    """B T L."""

    @property
    def is_worth_while(self) -> bool:
        """Whether this beats a dense mask; on a CPU, where every document is a call, many short ones do not."""
        return self.queries_P.is_cuda or calls_save_work(
            self.num_scores, len(self.query_ends_N1) - 1, self.num_dense_scores
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "DocumentPairs":
        """The same on another device, which model parallelism asks for."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("queries_P", "keys_S", "query_ends_N1", "key_ends_N1")
        }
        return dataclasses.replace(self, **tensors)


def calls_save_work(num_scores: int, num_documents: int, num_dense_scores: int) -> bool:
    """Whether a call for each document is faster on a CPU than one with a dense mask; the numbers as of `DocumentPairs`."""
    return num_scores + _SCORES_OF_A_CALL * num_documents < num_dense_scores


def pair_documents(query_documents_BT: Tensor | None, key_documents_BL: Tensor, num_queries: int) -> DocumentPairs:
    """Find the documents of targets and sources.

    The sizes of the result depend on the ids, so on a GPU the host waits for them: make it once for all layers, and
    before other work is queued.

        query_documents   1 1 2 0        query_ends  0 2 3        (document 2 has one query and two keys,
        key_documents     1 2 2 0        key_ends    0 1 3         padding is in no document)

    Args:
        query_documents_BT: (B, T) int64, 0 = padding, non-decreasing over the others; None: every query belongs to
            document 1, and keys of any document count as document 1.
        key_documents_BL: (B, L), likewise.
        num_queries: T.
    """
    device, batch = key_documents_BL.device, key_documents_BL.shape[0]
    key_documents_BL = key_documents_BL.cpu()
    if query_documents_BT is None:
        query_documents_BT = key_documents_BL.new_ones(batch, num_queries)
        key_documents_BL = (key_documents_BL != 0).long()
    query_documents_BT = query_documents_BT.cpu()
    documents_a_row = int(torch.maximum(query_documents_BT.max(), key_documents_BL.max()))
    positions, ends, counts = [], [], []
    for documents in (query_documents_BT, key_documents_BL):
        tokens = documents.flatten().nonzero()[:, 0]
        rows = tokens // documents.shape[1]
        counts_N = torch.bincount(
            rows * documents_a_row + documents.flatten()[tokens] - 1, minlength=batch * documents_a_row
        )
        positions.append(tokens)
        ends.append(F.pad(counts_N.cumsum(dim=0), (1, 0)).to(torch.int32))
        counts.append(counts_N)
    longest = [int(counts_N.max()) if len(counts_N) else 0 for counts_N in counts]
    return DocumentPairs(
        queries_P=positions[0],
        keys_S=positions[1],
        query_ends_N1=ends[0],
        key_ends_N1=ends[1],
        max_queries=longest[0],
        max_keys=longest[1],
        num_scores=int((counts[0] * counts[1]).sum()),
        num_dense_scores=query_documents_BT.numel() * key_documents_BL.shape[1],
    ).to(device)


def can_pair_documents(dtype: torch.dtype, d_kv: int, dropout_p: float, device: torch.device) -> bool:
    """Whether `cross_attention_per_document` serves such queries: on a GPU FlashAttention must take them."""
    if device.type != "cuda":
        return True
    is_flash_head = dtype in (torch.bfloat16, torch.float16) and d_kv % 8 == 0 and d_kv <= 256
    return is_flash_head and dropout_p == 0.0 and torch.cuda.get_device_capability(device) >= (8, 0)


def cross_attention_per_document(
    q_BTHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, pairs: DocumentPairs, dropout_p: float
) -> Tensor:
    """O = softmax(Q K') V within each pair of documents, 0 for the queries of none; unchecked."""
    q_PHK = q_BTHK.flatten(0, 1).index_select(0, pairs.queries_P)
    k_SHK, v_SHK = (x.flatten(0, 1).index_select(0, pairs.keys_S) for x in (k_BLHK, v_BLHK))
    attend = _by_flash_attention if q_PHK.is_cuda else _one_by_one
    o_PHK = attend(q_PHK, k_SHK, v_SHK, pairs, dropout_p)
    o_XHK = q_BTHK.new_zeros(q_BTHK.shape[0] * q_BTHK.shape[1], *q_BTHK.shape[2:], dtype=o_PHK.dtype)
    return o_XHK.index_copy(0, pairs.queries_P, o_PHK).view(*q_BTHK.shape)


def _by_flash_attention(q_PHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, pairs: DocumentPairs, dropout_p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    o_PHK = varlen_attn(
        q_PHK, k_SHK, v_SHK, pairs.query_ends_N1, pairs.key_ends_N1, pairs.max_queries, pairs.max_keys, scale=1.0
    )
    assert isinstance(o_PHK, Tensor)
    return o_PHK


def _one_by_one(q_PHK: Tensor, k_SHK: Tensor, v_SHK: Tensor, pairs: DocumentPairs, dropout_p: float) -> Tensor:
    queries, keys = pairs.query_ends_N1.diff().tolist(), pairs.key_ends_N1.diff().tolist()
    outputs = []
    for q_THK, k_LHK, v_LHK in zip(q_PHK.split(queries), k_SHK.split(keys), v_SHK.split(keys), strict=True):
        if len(q_THK) == 0:
            continue
        if len(k_LHK) == 0:
            outputs.append(torch.zeros_like(q_THK))
            continue
        q_HTK, k_HLK, v_HLK = (x.transpose(0, 1)[None] for x in (q_THK, k_LHK, v_LHK))
        o_HTK = F.scaled_dot_product_attention(q_HTK, k_HLK, v_HLK, dropout_p=dropout_p, scale=1.0)
        outputs.append(o_HTK[0].transpose(0, 1))
    return torch.cat(outputs)

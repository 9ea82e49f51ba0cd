"""Attention of target tokens to the source, without position bias."""

from spade_t5.kernels.cross_attention.naive import (
    cross_attention_naive,
    cross_attention_probabilities,
    visible_keys,
)
from spade_t5.kernels.cross_attention.op import cross_attention
from spade_t5.kernels.cross_attention.per_document import DocumentPairs, can_pair_documents, pair_documents

__all__ = [
    "DocumentPairs",
    "can_pair_documents",
    "cross_attention",
    "cross_attention_naive",
    "cross_attention_probabilities",
    "pair_documents",
    "visible_keys",
]

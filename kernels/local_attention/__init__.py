"""Banded attention with a learned relative bias, for rows that may hold several documents."""

from spade_t5.kernels.local_attention.naive import local_attention_naive, local_attention_probabilities
from spade_t5.kernels.local_attention.op import local_attention
from spade_t5.kernels.local_attention.torch_blocked import local_attention_blocked

__all__ = ["local_attention", "local_attention_blocked", "local_attention_naive", "local_attention_probabilities"]

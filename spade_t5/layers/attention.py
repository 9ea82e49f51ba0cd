"""Attention layers: local self-attention, causal self-attention with a key-value cache, cross-attention.

T5's attention has no 1/sqrt(d) (`scale` is 1 unless configured). Equal query and key lengths go through the banded op
`local_attention`, which also serves the decoder (unlimited to the left, nothing to the right); decoding from a cache
uses torch's `scaled_dot_product_attention`, cross-attention, which has neither band nor bias, the op `cross_attention`.

Letters: B batch, L source length, T query length, S key length, D d_model, H heads, K d_kv, R reach of the bias.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spade_t5.layers.projection import Projection
from spade_t5.layers.segments import SourceView
from spade_t5.ops import (
    cross_attention,
    cross_attention_probabilities,
    local_attention,
    local_attention_probabilities,
)


class KeyValueCache(Protocol):
    """What the decoder needs of an encoder-decoder cache; Hugging Face's `EncoderDecoderCache` is one."""

    self_attention_cache: Any
    cross_attention_cache: Any
    is_updated: dict[int, bool]

    def get_seq_length(self) -> int:
        """Number of target tokens held, T0."""
        ...


def offsets_between(query_tokens: int, key_tokens: int, first_query: int, device: torch.device) -> Tensor:
    """Key position minus query position, (T, S) int64, for queries that begin at position `first_query`."""
    queries_T = torch.arange(first_query, first_query + query_tokens, device=device)
    return torch.arange(key_tokens, device=device)[None, :] - queries_T[:, None]


def dense_bias(offset_bias_HR: Tensor, offsets_TS: Tensor) -> Tensor:
    """The bias matrix (H, T, S) that a bias by offset (H, 2R+1) stands for."""
    reach = offset_bias_HR.shape[1] // 2
    return offset_bias_HR[:, offsets_TS.clamp(-reach, reach) + reach]


class Attention(nn.Module):
    """The four projections that every attention layer owns, under their T5 names q, k, v, o."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_kv: int,
        *,
        dropout_rate: float,
        scale: float = 1.0,
        use_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.d_kv = d_kv
        self.dropout_rate = dropout_rate
        self.scale = scale
        inner = num_heads * d_kv
        # whatever the scale, initial scores have unit variance: T5's q folds 1/sqrt(d_kv) into its weights
        self.q = Projection(d_model, inner, std=(d_model * d_kv) ** -0.5 / scale, bias=use_bias)
        self.k = Projection(d_model, inner, std=d_model**-0.5, bias=use_bias)
        self.v = Projection(d_model, inner, std=d_model**-0.5, bias=use_bias)
        self.o = Projection(inner, d_model, std=inner**-0.5, bias=use_bias)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        q_BTHK = self._split_heads(self.q(x_BTD))
        return q_BTHK if self.scale == 1.0 else q_BTHK * self.scale

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _dropout_p(self) -> float:
        return self.dropout_rate if self.training else 0.0


class BandedSelfAttention(Attention):
    """Self-attention within a band and within a document, through the op `local_attention`.

    left, right: keys visible on each side of a query in tokens, None = unlimited.
    """

    left: int | None
    right: int | None

    def _attend(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, offset_bias: Tensor | None, segment_ids_BL: Tensor | None
    ) -> Tensor:
        out_BLHK = local_attention(
            q_BLHK,
            k_BLHK,
            v_BLHK,
            offset_bias,
            left=self.left,
            right=self.right,
            segment_ids=segment_ids_BL,
            dropout_p=self._dropout_p(),
        )
        return self.o(out_BLHK.flatten(-2))

    def _weights(
        self, q_BLHK: Tensor, k_BLHK: Tensor, offset_bias: Tensor | None, segment_ids_BL: Tensor | None
    ) -> Tensor:
        return local_attention_probabilities(q_BLHK, k_BLHK, offset_bias, self.left, self.right, segment_ids_BL)


class LocalSelfAttention(BandedSelfAttention):
    """Encoder self-attention: `radius` keys on both sides, None = all of the document."""

    def __init__(
        self, d_model: int, num_heads: int, d_kv: int, *, radius: int | None, dropout_rate: float, scale: float
    ) -> None:
        super().__init__(d_model, num_heads, d_kv, dropout_rate=dropout_rate, scale=scale)
        self.left = self.right = radius

    def forward(
        self, x_BLD: Tensor, offset_bias: Tensor | None, segment_ids_BL: Tensor | None, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attends within the band.

        Args:
            x_BLD: input.
            offset_bias: (H, 2R+1) fp32, or None.
            segment_ids_BL: int64, 0 = padding; None: one document fills each row.
            with_weights: compute the dense weights too; quadratic in L, for inspection.

        Returns:
            output (B, L, D) and weights (B, H, L, L) or None.
        """
        q, k, v = self._queries(x_BLD), self._split_heads(self.k(x_BLD)), self._split_heads(self.v(x_BLD))
        weights = self._weights(q, k, offset_bias, segment_ids_BL) if with_weights else None
        return self._attend(q, k, v, offset_bias, segment_ids_BL), weights


class CausalSelfAttention(BandedSelfAttention):
    """Decoder self-attention: every earlier token of the document, with or without a cache of keys and values."""

    left = None
    right = 0

    def forward(
        self,
        x_BTD: Tensor,
        offset_bias: Tensor | None,
        segment_ids_BT: Tensor | None,
        cache: KeyValueCache | None = None,
        layer_index: int = 0,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to the past.

        Args:
            x_BTD: input; with a cache, the tokens after the T0 held there.
            offset_bias: (H, 2R+1) fp32, or None.
            segment_ids_BT: documents of the row; with a cache (B, T0+T), 0 = padding, one document a row.
            cache: keys and values of earlier tokens; updated in place.
            layer_index: place of this layer in the cache.
            with_weights: return the dense weights too.

        Returns:
            output (B, T, D) and weights (B, H, T, T0+T) or None.
        """
        q, k, v = self._queries(x_BTD), self._split_heads(self.k(x_BTD)), self._split_heads(self.v(x_BTD))
        if cache is not None:
            return self._attend_cached(q, k, v, offset_bias, segment_ids_BT, cache, layer_index, with_weights)
        weights = self._weights(q, k, offset_bias, segment_ids_BT) if with_weights else None
        return self._attend(q, k, v, offset_bias, segment_ids_BT), weights

    def _attend_cached(
        self,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHK: Tensor,
        offset_bias: Tensor | None,
        segment_ids_BS: Tensor | None,
        cache: KeyValueCache,
        layer_index: int,
        with_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        k_BHSK, v_BHSK = cache.self_attention_cache.update(keys, values, layer_index)
        query_tokens, key_tokens = q_BTHK.shape[1], k_BHSK.shape[2]
        offsets_TS = offsets_between(query_tokens, key_tokens, key_tokens - query_tokens, q_BTHK.device)
        is_visible = (offsets_TS <= 0)[None, None]
        if segment_ids_BS is not None:
            is_visible = is_visible & (segment_ids_BS != 0)[:, None, None, :]
        bias_HTS = None if offset_bias is None else dense_bias(offset_bias, offsets_TS)
        mask = q_BTHK.new_zeros(()) if bias_HTS is None else bias_HTS[None].to(q_BTHK.dtype)
        mask = mask.masked_fill(~is_visible, torch.finfo(q_BTHK.dtype).min)
        out_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BHSK, v_BHSK, attn_mask=mask, dropout_p=self._dropout_p(), scale=1.0
        )
        weights = None
        if with_weights:
            weights = self._cached_weights(q_BTHK, k_BHSK, bias_HTS, is_visible)
        return self.o(out_BHTK.transpose(1, 2).flatten(-2)), weights

    @staticmethod
    def _cached_weights(q_BTHK: Tensor, k_BHSK: Tensor, bias_HTS: Tensor | None, is_visible: Tensor) -> Tensor:
        scores_BHTS = (q_BTHK.transpose(1, 2) @ k_BHSK.transpose(-1, -2)).to(
            torch.promote_types(q_BTHK.dtype, torch.float32)
        )
        if bias_HTS is not None:
            scores_BHTS = scores_BHTS + bias_HTS
        return scores_BHTS.masked_fill(~is_visible, torch.finfo(scores_BHTS.dtype).min).softmax(dim=-1)


class CrossAttention(Attention):
    """Decoder queries over encoder states, without position bias."""

    def forward(
        self,
        x_BTD: Tensor,
        encoder_BLD: Tensor,
        view: SourceView,
        cache: KeyValueCache | None = None,
        layer_index: int = 0,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to the source.

        Args:
            x_BTD: queries.
            encoder_BLD: encoder states; only read at the first call with a cache.
            view: which source tokens are seen. A query that sees nothing gets 0.
            cache: keeps the keys and values of the source between calls.
            layer_index: place of this layer in the cache.
            with_weights: return the dense weights too.

        Returns:
            output (B, T, D) and weights (B, H, T, L) or None.
        """
        q_BTHK = self._queries(x_BTD)
        k_BLHK, v_BLHK = self._source(encoder_BLD, cache, layer_index)
        out_BTHK = cross_attention(
            q_BTHK,
            k_BLHK,
            v_BLHK,
            query_documents=view.target_documents_BT,
            key_documents=view.source_documents_BL,
            pairs=view.pairs,
            dropout_p=self._dropout_p(),
        )
        weights = cross_attention_probabilities(q_BTHK, k_BLHK, view.is_visible()) if with_weights else None
        return self.o(out_BTHK.flatten(-2)), weights

    def _source(self, encoder_BLD: Tensor, cache: KeyValueCache | None, layer_index: int) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.is_updated.get(layer_index):
            held = cache.cross_attention_cache.layers[layer_index]
            return held.keys.transpose(1, 2), held.values.transpose(1, 2)
        k_BLHK, v_BLHK = self._split_heads(self.k(encoder_BLD)), self._split_heads(self.v(encoder_BLD))
        if cache is not None:
            cache.cross_attention_cache.update(k_BLHK.transpose(1, 2), v_BLHK.transpose(1, 2), layer_index)
            cache.is_updated[layer_index] = True
        return k_BLHK, v_BLHK

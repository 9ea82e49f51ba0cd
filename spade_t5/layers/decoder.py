"""Decoder: T5's, causal self-attention over the document, cross-attention over its source, feed-forward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spade_t5.layers.attention import CausalSelfAttention, CrossAttention, KeyValueCache
from spade_t5.layers.config import LayersConfig
from spade_t5.layers.encoder import StackOutput
from spade_t5.layers.feed_forward import FEED_FORWARDS
from spade_t5.layers.norm import make_norm
from spade_t5.layers.position_bias import PositionEmbedding, RelativeAttentionBias
from spade_t5.layers.segments import WHOLE_SOURCE, SourceView, segment_positions
from spade_t5.ops import can_pair_documents


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention, feed-forward, each with a residual sum."""

    def __init__(self, config: LayersConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.is_pre_norm = config.norm_placement == "pre"
        norm_arguments = (config.norm_type, config.d_model, config.layer_norm_epsilon)
        sizes = (config.d_model, config.num_heads, config.d_kv)
        dropout_rate, scale, use_bias = config.dropout_rate, config.attention_scale, config.use_bias
        self.self_attention_norm = make_norm(*norm_arguments)
        self.self_attention = CausalSelfAttention(*sizes, dropout_rate=dropout_rate, scale=scale, use_bias=use_bias)
        self.cross_attention_norm = make_norm(*norm_arguments)
        self.cross_attention = CrossAttention(*sizes, dropout_rate=dropout_rate, scale=scale, use_bias=use_bias)
        self.feed_forward_norm = make_norm(*norm_arguments)
        self.feed_forward = FEED_FORWARDS[config.feed_forward_proj](config.d_model, config.d_ff, dropout_rate, use_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(
        self,
        x_BTD: Tensor,
        encoder_BLD: Tensor,
        offset_bias: Tensor | None,
        segment_ids_BT: Tensor | None,
        source_view: SourceView,
        cache: KeyValueCache | None = None,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer; the arguments are those of its attention layers.

        Returns:
            output (B, T, D), self-attention weights or None, cross-attention weights or None.
        """
        dropout_p = self.dropout.p if self.training else 0.0
        h_BTD = self.self_attention_norm(x_BTD) if self.is_pre_norm else x_BTD
        a_BTD, weights = self.self_attention(h_BTD, offset_bias, segment_ids_BT, cache, self.layer_index, with_weights)
        x_BTD, h_BTD = self._add(a_BTD, x_BTD, self.self_attention_norm, self.cross_attention_norm, dropout_p)
        a_BTD, cross_weights = self.cross_attention(
            h_BTD, encoder_BLD, source_view, cache, self.layer_index, with_weights
        )
        x_BTD, h_BTD = self._add(a_BTD, x_BTD, self.cross_attention_norm, self.feed_forward_norm, dropout_p)
        f_BTD = self.feed_forward(h_BTD)
        if self.is_pre_norm:
            return x_BTD + self.dropout(f_BTD), weights, cross_weights
        return self.feed_forward_norm(f_BTD, x_BTD, dropout_p)[1], weights, cross_weights

    def _add(
        self, branch_BTD: Tensor, x_BTD: Tensor, own_norm: nn.Module, next_norm: nn.Module, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after a branch, and what the next branch reads."""
        if self.is_pre_norm:
            return next_norm(branch_BTD, x_BTD, dropout_p)
        _, x_BTD = own_norm(branch_BTD, x_BTD, dropout_p)
        return x_BTD, x_BTD


class DecoderStack(nn.Module):
    """Target embeddings and encoder states in, decoder states out."""

    _gradient_checkpointing_func: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.bias_reach_tokens = config.relative_attention_max_distance
        self.gradient_checkpointing = False
        norm_arguments = (config.norm_type, config.d_model, config.layer_norm_epsilon)
        self.positions = (
            PositionEmbedding(config.decoder_positions, config.d_model) if config.decoder_positions else None
        )
        self.relative_attention_bias = None
        if self.positions is None:
            self.relative_attention_bias = RelativeAttentionBias(
                config.num_heads,
                num_buckets=config.relative_attention_num_buckets,
                max_distance=config.relative_attention_max_distance,
                bidirectional=False,
                std=config.d_model**-0.5,
            )
        self.embedding_norm = make_norm(*norm_arguments) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_decoder_layers))
        self.final_norm = make_norm(*norm_arguments) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_rate)

    def lay_out(self, source_view: SourceView, target_tokens: int) -> SourceView:
        """The view with its documents found, where cross-attention can go document by document.

        A GPU is waited for, so this is best done before the encoder is queued. A compiled graph keeps the masks: its
        sizes must not depend on ids.
        """
        documents_BL = source_view.source_documents_BL
        if documents_BL is None or torch.compiler.is_compiling():
            return source_view
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        device, attention = documents_BL.device, layer.cross_attention
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else attention.q.weight.dtype
        dropout_p = attention.dropout_rate if self.training else 0.0
        serves = can_pair_documents(dtype, attention.d_kv, dropout_p, device)
        return source_view.with_pairs(target_tokens) if serves else source_view

    def forward(
        self,
        embeddings_BTD: Tensor,
        encoder_BLD: Tensor,
        segment_ids_BT: Tensor | None = None,
        source_view: SourceView = WHOLE_SOURCE,
        cache: KeyValueCache | None = None,
        *,
        with_hidden_states: bool = False,
        with_attentions: bool = False,
    ) -> StackOutput:
        """Runs the layers.

        Args:
            embeddings_BTD: token embeddings; with a cache, of the tokens after the T0 held there.
            encoder_BLD: encoder states.
            segment_ids_BT: int64 documents of the row, None: one fills it; with a cache (B, T0+T), 0 = padding.
            source_view: source tokens that each target token may see.
            cache: keys and values of earlier tokens and of the source; updated in place.
            with_hidden_states: keep the output of every layer.
            with_attentions: return the attention weights of every layer.

        Raises:
            ValueError: more tokens than absolute positions.
        """
        if self.positions is not None:
            embeddings_BTD = embeddings_BTD + self._position_embeddings(
                self.positions, embeddings_BTD, segment_ids_BT, cache
            )
        offset_bias = None
        if self.relative_attention_bias is not None:
            offset_bias = self.relative_attention_bias(self.bias_reach_tokens)

        x_BTD = self.dropout(self.embedding_norm(embeddings_BTD))
        hidden_states = [x_BTD] if with_hidden_states else []
        attentions: list[Tensor] = []
        cross_attentions: list[Tensor] = []
        for layer in self.layers:
            arguments = (x_BTD, encoder_BLD, offset_bias, segment_ids_BT, source_view, cache, with_attentions)
            if (
                self.gradient_checkpointing and self.training and cache is None
            ):  # recomputing would fill the cache twice
                x_BTD, weights, cross_weights = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x_BTD, weights, cross_weights = layer(*arguments)
            hidden_states += [x_BTD] if with_hidden_states else []
            attentions += [weights] if weights is not None else []
            cross_attentions += [cross_weights] if cross_weights is not None else []
        x_BTD = self.dropout(self.final_norm(x_BTD))
        hidden_states[-1:] = [x_BTD] if with_hidden_states else []
        return StackOutput(
            x_BTD,
            tuple(hidden_states) if with_hidden_states else None,
            tuple(attentions) if with_attentions else None,
            tuple(cross_attentions) if with_attentions else None,
        )

    def _position_embeddings(
        self, table: PositionEmbedding, embeddings_BTD: Tensor, segment_ids: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        num_tokens = embeddings_BTD.shape[1]
        num_held = cache.get_seq_length() if cache is not None else 0
        if segment_ids is not None:
            positions = segment_positions(segment_ids)[:, num_held:]
        else:
            if num_held + num_tokens > table.num_positions:
                raise ValueError(
                    f"decoder input of {num_held + num_tokens} tokens; decoder_positions is {table.num_positions}"
                )
            positions = torch.arange(num_held, num_held + num_tokens, device=embeddings_BTD.device)[None]
        return table(positions)

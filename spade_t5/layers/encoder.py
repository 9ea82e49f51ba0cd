"""Encoder: layers of local self-attention, of which the chosen ones also hold a global mixer.

A global layer (SPADE, arXiv:2212.08136), with h = norm(x):

    a = fuse(mixer(h), attention(h));   x = x + a;   x = x + feed_forward(norm(x))

Every other layer has a = attention(h). With `norm_placement` post, norms follow the residual sums instead and h = x.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from spade_t5.layers.attention import LocalSelfAttention
from spade_t5.layers.config import LayersConfig
from spade_t5.layers.feed_forward import FEED_FORWARDS
from spade_t5.layers.fusion import FUSIONS, Fusion
from spade_t5.layers.norm import TransposingRMSNorm, make_norm
from spade_t5.layers.position_bias import RelativeAttentionBias
from spade_t5.layers.segments import chunk_segments
from spade_t5.layers.ssm import GLOBAL_MIXERS


class StackOutput(NamedTuple):
    """What a stack of layers returns."""

    last_hidden_state: Tensor
    """(B, L, D)."""
    hidden_states: tuple[Tensor, ...] | None
    """The embeddings, then the output of every layer; the last one is `last_hidden_state`."""
    attentions: tuple[Tensor, ...] | None
    """Self-attention weights of every layer, (B, H, L, L)."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """Cross-attention weights of every decoder layer, (B, H, T, L)."""


class EncoderLayer(nn.Module):
    """Self-attention, joined to a global mixer if `is_global`, then the feed-forward block."""

    def __init__(self, config: LayersConfig, *, is_global: bool) -> None:
        super().__init__()
        norm_arguments = (config.norm_type, config.d_model, config.layer_norm_epsilon)
        self.is_pre_norm = config.norm_placement == "pre"
        # a global layer's norm also lays its result out for the mixer
        transposes = is_global and self.is_pre_norm and config.norm_type == "rms"
        self.self_attention_norm = (
            TransposingRMSNorm(config.d_model, config.layer_norm_epsilon) if transposes else make_norm(*norm_arguments)
        )
        self.self_attention = LocalSelfAttention(
            config.d_model,
            config.num_heads,
            config.d_kv,
            radius=None if config.local_attention == "full" else config.local_radius,
            dropout_rate=config.dropout_rate,
            scale=config.attention_scale,
        )
        self.bias_reach_tokens = config.encoder_bias_reach_tokens
        self.relative_attention_bias = None if config.encoder_bias_shared else encoder_bias(config)
        self.global_mixer: nn.Module | None = None
        self.fusion: Fusion | None = None
        if is_global:
            self.global_mixer = GLOBAL_MIXERS[config.global_mixer](
                config.d_model,
                d_state=config.d_state,
                dt_min=config.dt_min,
                dt_max=config.dt_max,
                bidirectional=True,
                training_mode=config.ssm_training,
            )
            self.fusion = FUSIONS[config.fusion](config.d_model, config.norm_type, config.layer_norm_epsilon)
        self.feed_forward_norm = make_norm(*norm_arguments)
        self.feed_forward = FEED_FORWARDS[config.feed_forward_proj](
            config.d_model, config.d_ff, config.dropout_rate, config.use_bias
        )
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self,
        x_BLD: Tensor,
        offset_bias: Tensor | None,
        segment_ids_BL: Tensor | None,
        attention_segment_ids_BL: Tensor | None,
        with_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            x_BLD: input.
            offset_bias: (H, 2R+1) of the shared table; None where the layer has its own.
            segment_ids_BL: documents, for the mixer.
            attention_segment_ids_BL: the same, or refined to chunks, for the attention.
            with_weights: return the attention weights too.

        Returns:
            output (B, L, D) and weights (B, H, L, L) or None.
        """
        if self.relative_attention_bias is not None:
            offset_bias = self.relative_attention_bias(self.bias_reach_tokens)
        h_BLD = self.self_attention_norm(x_BLD) if self.is_pre_norm else x_BLD
        mixer_input_BLD = h_BLD
        if isinstance(h_BLD, tuple):
            h_BLD, mixer_input_BLD = h_BLD
        if self.global_mixer is None or self.fusion is None:
            a_BLD, weights = self.self_attention(h_BLD, offset_bias, attention_segment_ids_BL, with_weights)
        else:
            g_BLD = self.global_mixer(mixer_input_BLD, segment_ids_BL)
            local_input_BLD = g_BLD if self.fusion.serial else h_BLD
            a_BLD, weights = self.self_attention(local_input_BLD, offset_bias, attention_segment_ids_BL, with_weights)
            a_BLD = self.fusion(g_BLD, a_BLD)
        dropout_p = self.dropout.p if self.training else 0.0
        if self.is_pre_norm:
            x_BLD, h_BLD = self.feed_forward_norm(a_BLD, x_BLD, dropout_p)
            return x_BLD + self.dropout(self.feed_forward(h_BLD)), weights
        _, x_BLD = self.self_attention_norm(a_BLD, x_BLD, dropout_p)
        _, x_BLD = self.feed_forward_norm(self.feed_forward(x_BLD), x_BLD, dropout_p)
        return x_BLD, weights


class EncoderStack(nn.Module):
    """Embeddings in, encoder states out."""

    _gradient_checkpointing_func: Callable[..., tuple[Tensor, Tensor | None]]

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.local_radius + 1 if config.local_attention == "chunk" else None
        self.bias_reach_tokens = config.encoder_bias_reach_tokens
        self.gradient_checkpointing = False
        norm_arguments = (config.norm_type, config.d_model, config.layer_norm_epsilon)
        self.embedding_norm = make_norm(*norm_arguments) if config.embedding_norm else nn.Identity()
        self.relative_attention_bias = encoder_bias(config) if config.encoder_bias_shared else None
        self.layers = nn.ModuleList(
            EncoderLayer(config, is_global=i in config.global_layers) for i in range(config.num_layers)
        )
        self.final_norm = make_norm(*norm_arguments) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_rate)

    def run(
        self,
        embeddings_BLD: Tensor,
        segment_ids_BL: Tensor | None,
        *,
        with_hidden_states: bool = False,
        with_attentions: bool = False,
    ) -> StackOutput:
        """Runs the layers.

        Args:
            embeddings_BLD: token embeddings.
            segment_ids_BL: int64, 0 = padding, 1.. = document; None: one document fills each row.
            with_hidden_states: keep the output of every layer.
            with_attentions: compute the attention weights of every layer; quadratic in L.
        """
        attention_segment_ids_BL = segment_ids_BL
        if self.chunk_tokens is not None:
            documents_BL = segment_ids_BL
            if documents_BL is None:
                documents_BL = embeddings_BLD.new_ones(embeddings_BLD.shape[:2]).long()
            attention_segment_ids_BL = chunk_segments(documents_BL, self.chunk_tokens)
        offset_bias = None
        if self.relative_attention_bias is not None:
            offset_bias = self.relative_attention_bias(self.bias_reach_tokens)

        x_BLD = self.dropout(self.embedding_norm(embeddings_BLD))
        hidden_states = [x_BLD] if with_hidden_states else []
        attentions: list[Tensor] = []
        for layer in self.layers:
            arguments = (x_BLD, offset_bias, segment_ids_BL, attention_segment_ids_BL, with_attentions)
            if self.gradient_checkpointing and self.training:
                x_BLD, weights = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                x_BLD, weights = layer(*arguments)
            hidden_states += [x_BLD] if with_hidden_states else []
            attentions += [weights] if weights is not None else []
        x_BLD = self.dropout(self.final_norm(x_BLD))
        hidden_states[-1:] = [x_BLD] if with_hidden_states else []
        return StackOutput(
            x_BLD,
            tuple(hidden_states) if with_hidden_states else None,
            tuple(attentions) if with_attentions else None,
        )


def encoder_bias(config: LayersConfig) -> RelativeAttentionBias:
    """A table of relative biases for the encoder."""
    return RelativeAttentionBias(
        config.num_heads,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        bidirectional=True,
        std=config.d_model**-0.5,
    )

"""SPADE-T5 as Hugging Face models: encoder, encoder-decoder, and the encoder-decoder with a language-modelling head.

The mathematics is in `spade_t5.layers`; here are token ids, embeddings, the head, masks from Hugging Face's arguments,
the loss, generation and loading. The sequence classifier is in `classification.py`.

Packed rows: `segment_ids` (B, L) and `decoder_segment_ids` (B, T) say which document of the row a token belongs to,
0 = padding. A packed row gives every document the states, logits and gradients it has alone.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils.generic import can_return_tuple

from spade_t5.configuration import SpadeT5Config
from spade_t5.layers.decoder import DecoderStack
from spade_t5.layers.encoder import EncoderStack, StackOutput
from spade_t5.layers.head import LanguageModelHead, TokenLossConfig
from spade_t5.layers.segments import SourceView, segments_from_mask, shift_right
from spade_t5.layers.ssm import SSMMixer

WHOLE_MODULES = ["EncoderLayer", "DecoderLayer"]
"""Modules that a device map must not split."""

FLOAT32_MODULES = ["global_mixer"]
"""State-space parameters are exponents and phases of long memories: the 8 bits of bf16 would change the model."""

TIED_WEIGHTS = {"lm_head.weight": "encoder.embed_tokens.weight"}
"""Alias and source of the head's weights where `tie_word_embeddings` is set."""

# one checkpoint serves every class; the parts that a class lacks are no surprise
CLASSIFIER_PREFIX = "classification_head."
DECODER_KEYS, HEAD_KEYS, CLASSIFIER_KEYS = r"^decoder\.", r"^lm_head\.", rf"^{re.escape(CLASSIFIER_PREFIX)}"
WITHOUT_DECODER = [DECODER_KEYS, HEAD_KEYS, CLASSIFIER_KEYS]
WITHOUT_HEAD = [HEAD_KEYS, CLASSIFIER_KEYS]
WITHOUT_CLASSIFIER = [CLASSIFIER_KEYS]


class SpadeT5Encoder(EncoderStack):
    """Token embeddings and the encoder's layers. The embeddings also serve the decoder and, if tied, the head."""

    main_input_name = "input_ids"  # `generate` looks it up on the encoder

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config.layers_config())
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Encodes rows; see `SpadeT5Model.forward` for the arguments."""
        embeddings = embed(self.embed_tokens, input_ids, inputs_embeds)
        output = self.run(
            embeddings,
            resolve_segments(attention_mask, segment_ids, name="segment_ids"),
            with_hidden_states=bool(output_hidden_states),
            with_attentions=bool(output_attentions),
        )
        result = BaseModelOutput(
            last_hidden_state=output.last_hidden_state, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return result if return_dict else result.to_tuple()


class SpadeT5PreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all SPADE-T5 models."""

    config: SpadeT5Config
    config_class = SpadeT5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = WHOLE_MODULES
    _keep_in_fp32_modules_strict = FLOAT32_MODULES
    encoder: SpadeT5Encoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initial_embedding_std)
        elif isinstance(module, SSMMixer):
            module.init_parameters()
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table that encoder and decoder share."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding table."""
        self.encoder.embed_tokens = value  # type: ignore[assignment]

    def _wants(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return {"output_attentions": bool(output_attentions), "output_hidden_states": bool(output_hidden_states)}


class SpadeT5EncoderModel(SpadeT5PreTrainedModel):
    """The encoder alone, for features."""

    _keys_to_ignore_on_load_unexpected = WITHOUT_DECODER

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config)
        self.encoder = SpadeT5Encoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """Encodes rows; see `SpadeT5Model.forward` for the arguments."""
        wanted = self._wants(output_attentions, output_hidden_states)
        return self.encoder(input_ids, attention_mask, inputs_embeds, segment_ids, **wanted)


class SpadeT5EncoderDecoder(SpadeT5PreTrainedModel):
    """What the encoder-decoder has in common with and without a head; not for direct use."""

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config)
        self.encoder = SpadeT5Encoder(config)
        self.decoder = DecoderStack(config.layers_config())

    def prepare_decoder_input_ids_from_labels(
        self, labels: Tensor, decoder_segment_ids: Tensor | None = None
    ) -> Tensor:
        """Decoder inputs for teacher forcing: labels shifted right, documents opened by `decoder_start_token_id`."""
        pad_id = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        return shift_right(
            labels, start_id=self.config.decoder_start_token_id, pad_id=pad_id, segment_ids_BT=decoder_segment_ids
        )

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        segment_ids: Tensor | None,
        encoder_outputs: Any,
        wanted: dict[str, bool],
    ) -> BaseModelOutput:
        if encoder_outputs is None:
            return self.encoder(input_ids, attention_mask, inputs_embeds, segment_ids, **wanted)
        if isinstance(encoder_outputs, BaseModelOutput):
            return encoder_outputs
        return BaseModelOutput(*encoder_outputs)

    def _lay_out(
        self,
        target_view: tuple[Tensor | None, SourceView],
        target: Tensor,
        past_key_values: EncoderDecoderCache | None,
    ) -> tuple[Tensor | None, SourceView]:
        """The view with its documents found; token by token, from a cache, that is not worth its while."""
        segments_BT, source_view = target_view
        if past_key_values is not None:
            return target_view
        return segments_BT, self.decoder.lay_out(source_view, target.shape[1])

    def _decode(
        self,
        encoded: BaseModelOutput,
        decoder_input_ids: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        target_segments: Tensor | None,
        source_view: SourceView,
        past_key_values: EncoderDecoderCache | None,
        wanted: dict[str, bool],
    ) -> StackOutput:
        return self.decoder(
            embed(self.encoder.embed_tokens, decoder_input_ids, decoder_inputs_embeds, prefix="decoder_"),
            encoded.last_hidden_state,
            target_segments,
            source_view,
            past_key_values,
            with_hidden_states=wanted["output_hidden_states"],
            with_attentions=wanted["output_attentions"],
        )

    def _cache(self, past_key_values: Any, use_cache: bool | None, is_packed: bool) -> EncoderDecoderCache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_packed
        if not use_cache:
            return past_key_values
        if is_packed:
            raise ValueError(
                "use_cache: a cache holds one document a row; pass use_cache=False with decoder_segment_ids"
            )
        return past_key_values if past_key_values is not None else EncoderDecoderCache(DynamicCache(), DynamicCache())


class SpadeT5Model(SpadeT5EncoderDecoder):
    """Encoder and decoder without a head."""

    _keys_to_ignore_on_load_unexpected = WITHOUT_HEAD

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Encodes the source and decodes the target.

        Args:
            input_ids: source ids (B, L).
            attention_mask: (B, L), 0 = padding.
            decoder_input_ids: target ids (B, T), the first being the decoder start.
            decoder_attention_mask: (B, T), 0 = padding; with a cache (B, T0+T).
            encoder_outputs: result of an earlier encoding, used instead of the source.
            past_key_values: cache; the target ids are then those after it.
            inputs_embeds: source embeddings (B, L, D) instead of ids.
            decoder_inputs_embeds: target embeddings (B, T, D) instead of ids.
            segment_ids: (B, L) int64, documents of packed source rows; wins over `attention_mask`.
            decoder_segment_ids: (B, T) int64, their targets; document n attends to source document n.
            use_cache: return keys and values; default: only when evaluating rows with one document each.
            output_attentions: return attention weights (quadratic in length; of a global layer, the local branch's).
            output_hidden_states: return the output of every layer.

        Returns:
            Hugging Face's output. Without any target only the encoder runs and the decoder's fields are None.

        Raises:
            ValueError: ids and embeddings are both given or both missing, or segment ids and masks disagree.
        """
        wanted = self._wants(output_attentions, output_hidden_states)
        target_view = resolve_target_view(attention_mask, segment_ids, decoder_attention_mask, decoder_segment_ids)
        target = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        if target is not None:
            past_key_values = self._cache(past_key_values, use_cache, decoder_segment_ids is not None)
            target_view = self._lay_out(target_view, target, past_key_values)
        encoded = self._encode(input_ids, attention_mask, inputs_embeds, segment_ids, encoder_outputs, wanted)
        encoder_fields: dict[str, Any] = {
            "encoder_last_hidden_state": encoded.last_hidden_state,
            "encoder_hidden_states": encoded.hidden_states,
            "encoder_attentions": encoded.attentions,
        }
        if target is None:
            return Seq2SeqModelOutput(**encoder_fields)
        decoded = self._decode(encoded, decoder_input_ids, decoder_inputs_embeds, *target_view, past_key_values, wanted)
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            **encoder_fields,
        )


@dataclass
class SpadeT5LMOutput(Seq2SeqLMOutput):
    """Hugging Face's output, and what a summed loss consists of."""

    token_losses: Tensor | None = None
    """Loss of every label (B, T), float32 without a gradient, 0 where the label is ignored; only with `token_loss`."""


class SpadeT5ForConditionalGeneration(SpadeT5EncoderDecoder, GenerationMixin):
    """Encoder, decoder and language-modelling head: pretraining, text-to-text fine-tuning, generation."""

    _tied_weights_keys = TIED_WEIGHTS
    _keys_to_ignore_on_load_unexpected = WITHOUT_CLASSIFIER

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config)
        self.lm_head = LanguageModelHead(config.d_model, config.vocab_size, std=config.initial_head_std)
        self.post_init()

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        """`resize_token_embeddings` makes a plain linear map of the head; the head that also computes losses takes it in."""
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        if resized is not old_lm_head:
            old_lm_head.weight, old_lm_head.out_features = resized.weight, resized.out_features
        return old_lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_loss: TokenLossConfig | None = None,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SpadeT5LMOutput:
        """Logits of the next target token.

        Args:
            input_ids: as for `SpadeT5Model.forward`, like all that is not described here.
            attention_mask: as there.
            decoder_input_ids: as there; default: `labels` shifted right, the decoder start before every document.
            decoder_attention_mask: as there.
            encoder_outputs: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            decoder_inputs_embeds: as there.
            labels: target ids (B, T), -100 = ignored.
            token_loss: with labels: only compute their summed loss, straight from the decoder states, and no logits.
            segment_ids: as there.
            decoder_segment_ids: as there.
            use_cache: as there; with labels no cache is kept unless asked for.
            output_attentions: as there.
            output_hidden_states: as there.

        Returns:
            `logits` (B, T, V), with labels also `loss`: mean cross-entropy over the labels that are not ignored. With
            `token_loss` no logits: `loss` is the sum over those labels, `token_losses` (B, T) what it sums.

        Raises:
            ValueError: as there.
        """
        wanted = self._wants(output_attentions, output_hidden_states)
        target_view = resolve_target_view(attention_mask, segment_ids, decoder_attention_mask, decoder_segment_ids)
        if labels is not None:
            use_cache = bool(use_cache)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels, decoder_segment_ids)
        past_key_values = self._cache(past_key_values, use_cache, decoder_segment_ids is not None)
        target = decoder_input_ids if decoder_input_ids is not None else decoder_inputs_embeds
        if target is not None:  # without one, the decoder's own complaint comes
            target_view = self._lay_out(target_view, target, past_key_values)
        encoded = self._encode(input_ids, attention_mask, inputs_embeds, segment_ids, encoder_outputs, wanted)
        decoded = self._decode(encoded, decoder_input_ids, decoder_inputs_embeds, *target_view, past_key_values, wanted)
        states_BTD = decoded.last_hidden_state * self.config.logit_scale
        loss = logits_BTV = token_losses_BT = None
        if labels is not None and token_loss is not None:
            loss, token_losses_BT = self.lm_head(states_BTD, labels.to(states_BTD.device), token_loss)
        else:
            logits_BTV = self.lm_head(states_BTD)
        if labels is not None and logits_BTV is not None:
            loss = F.cross_entropy(at_least_fp32(logits_BTV).flatten(0, 1), labels.to(logits_BTV.device).flatten())
        return SpadeT5LMOutput(
            loss=loss,
            logits=logits_BTV,
            token_losses=token_losses_BT,
            past_key_values=past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's `generate`, one document a row.

        Raises:
            ValueError: segment ids are given: a packed row has no place for its documents to grow.
        """
        for name in ("segment_ids", "decoder_segment_ids"):
            if kwargs.get(name) is not None:
                raise ValueError(f"generate: {name} is not supported; give one document a row with attention_mask")
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # transformers types `self` as a protocol


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision widened for a loss; double stays double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def embed(table: nn.Embedding, ids: Tensor | None, embeddings: Tensor | None, prefix: str = "") -> Tensor:
    """Embeddings of ids, or the ones given.

    Raises:
        ValueError: not exactly one of the two is given.
    """
    if (ids is None) == (embeddings is None):
        which = "both" if ids is not None else "neither"
        embeds_name = "decoder_inputs_embeds" if prefix else "inputs_embeds"
        raise ValueError(f"give exactly one of {prefix}input_ids and {embeds_name}: {which} given")
    return table(ids) if embeddings is None else embeddings


def resolve_segments(attention_mask: Tensor | None, segment_ids: Tensor | None, *, name: str) -> Tensor | None:
    """Segment ids from the two ways to tell them; None: one document fills each row.

    Raises:
        ValueError: both are given and do not agree on what is padding.
    """
    if segment_ids is None:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention mask of shape {tuple(attention_mask.shape)}: give one number per token, (B, L)"
            )
        return segments_from_mask(attention_mask)
    if attention_mask is not None and not torch.equal(attention_mask != 0, segment_ids != 0):
        raise ValueError(f"{name} and the attention mask disagree on which tokens are padding: leave the mask out")
    return segment_ids


def resolve_target_view(
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    decoder_segment_ids: Tensor | None,
) -> tuple[Tensor | None, SourceView]:
    """What a target token belongs to and may see of the source.

    Returns:
        segment ids of the target or None (one document fills each row), and the view of the source: that of the own
        document in packed rows, else all but padding.

    Raises:
        ValueError: only one side is packed, or ids and masks disagree.
    """
    if (segment_ids is None) != (decoder_segment_ids is None):
        missing = "segment_ids" if segment_ids is None else "decoder_segment_ids"
        raise ValueError(f"{missing}: packed rows need segment ids on both sides; this one is missing")
    source_segments_BL = resolve_segments(attention_mask, segment_ids, name="segment_ids")
    target_segments_BT = resolve_segments(decoder_attention_mask, decoder_segment_ids, name="decoder_segment_ids")
    return target_segments_BT, SourceView(decoder_segment_ids, source_segments_BL)

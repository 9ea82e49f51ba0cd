"""Sequence classification and regression on the encoder: one label per document, packed rows included."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from spade_t5.configuration import SpadeT5Config
from spade_t5.layers.projection import Projection
from spade_t5.layers.segments import segments_from_mask
from spade_t5.modeling import DECODER_KEYS, HEAD_KEYS, SpadeT5Encoder, SpadeT5PreTrainedModel, at_least_fp32

IGNORED_LABEL = -100

WITHOUT_TEXT_HEAD = [DECODER_KEYS, HEAD_KEYS]
"""Parts of a text-to-text checkpoint that the classifier has no use for."""


class ClassificationHead(nn.Module):
    """out_proj(dropout(tanh(dense(dropout(x)))))."""

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__()
        std = config.d_model**-0.5
        self.dense = Projection(config.d_model, config.d_model, std=std, bias=True)
        self.out_proj = Projection(config.d_model, config.num_labels or 2, std=std, bias=True)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., num_labels)."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class SpadeT5ForSequenceClassification(SpadeT5PreTrainedModel):
    """Mean of the encoder states of a document, then a small head; one label is regression."""

    _keys_to_ignore_on_load_unexpected = WITHOUT_TEXT_HEAD

    def __init__(self, config: SpadeT5Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = SpadeT5Encoder(config)
        self.classification_head = ClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Scores every document.

        Args:
            input_ids: ids (B, L).
            attention_mask: (B, L), 0 = padding.
            inputs_embeds: embeddings (B, L, D) instead of ids.
            labels: (B,), or (B, S) with `segment_ids`; class numbers with -100 = absent, or, for regression
                (`num_labels` 1), numbers with nan or -100 = absent.
            segment_ids: (B, L) int64, documents 1..S of packed rows, 0 = padding.
            output_attentions: return attention weights.
            output_hidden_states: return the output of every layer.

        Returns:
            `logits` (B, num_labels), or (B, S, num_labels) with `segment_ids`, where S is the width of `labels`, or the
            largest segment id without labels; with labels also `loss`, the mean over those present: cross-entropy, or
            squared error for regression.

        Raises:
            ValueError: a row holds more documents than labels has columns, or segment ids and mask disagree.
        """
        wanted = self._wants(output_attentions, output_hidden_states)
        encoded = self.encoder(input_ids, attention_mask, inputs_embeds, segment_ids, **wanted)
        states_BLD = encoded.last_hidden_state
        if segment_ids is None:
            documents_BL = segments_from_mask(attention_mask)
            if documents_BL is None:
                documents_BL = states_BLD.new_ones(states_BLD.shape[:2]).long()
            logits = self.classification_head(mean_per_document(states_BLD, documents_BL, 1))[:, 0]
        else:
            num_documents = labels.shape[1] if labels is not None else max(1, int(segment_ids.max()))
            logits = self.classification_head(mean_per_document(states_BLD, segment_ids, num_documents))
        return SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels.to(logits.device)),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_fp32(logits)
        if self.num_labels == 1:
            labels = labels.reshape(logits.shape[:-1]).to(logits.dtype)
            is_present = ~(labels.isnan() | (labels == IGNORED_LABEL))
            errors = (logits[..., 0] - labels.where(is_present, 0.0)) * is_present
            return errors.square().sum() / is_present.sum()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)


def mean_per_document(states_BLD: Tensor, segment_ids_BL: Tensor, num_documents: int) -> Tensor:
    """Mean state of each of the documents 1..S, (B, S, D); 0 where a row holds fewer.

    Raises:
        ValueError: a segment id is above S (looked up on a CPU only).
    """
    if segment_ids_BL.device.type == "cpu" and int(segment_ids_BL.max()) > num_documents:
        raise ValueError(f"a row holds document {int(segment_ids_BL.max())} but labels has {num_documents} columns")
    numbers_S1 = torch.arange(1, num_documents + 1, device=segment_ids_BL.device)[:, None]
    is_member_BSL = segment_ids_BL[:, None, :] == numbers_S1
    sums_BSD = is_member_BSL.to(states_BLD.dtype) @ states_BLD
    return sums_BSD / is_member_BSL.sum(dim=-1, keepdim=True).clamp(min=1)

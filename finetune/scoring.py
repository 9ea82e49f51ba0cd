"""From a trained model to predictions: likelihood of label words, free generation, encoder head.

Shapes: B sources, L source length, C label words, T target length, V vocabulary, D d_model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from spade_t5.training.objectives import IGNORED_LABEL


@torch.inference_mode()
def label_log_likelihoods(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor, label_ids: Sequence[Sequence[int]]
) -> Tensor:
    """Log-likelihood of every label word after every source (rank classification).

    score[b, c] = sum_t log p(y_ct | y_c1 .. y_c,t-1, source b), end mark included, so no word is favoured for being
    the beginning of another. The encoder runs once for a source, the decoder once for all words together.

    Args:
        model: an encoder-decoder in evaluation mode.
        input_ids_BL: sources, padded on the right.
        attention_mask_BL: 1 at tokens, 0 at padding.
        label_ids: token ids of each label word, end mark included.

    Returns:
        float32 tensor of shape (B, C).
    """
    num_sources, num_words = len(input_ids_BL), len(label_ids)
    labels_CT = padded(label_ids, IGNORED_LABEL).to(input_ids_BL.device)
    states_BLD = model.get_encoder()(input_ids=input_ids_BL, attention_mask=attention_mask_BL).last_hidden_state
    labels_NT = labels_CT.repeat(num_sources, 1)  # N = B C, the words of one source next to each other
    logits_NTV = model(
        encoder_outputs=(states_BLD.repeat_interleave(num_words, 0),),
        attention_mask=attention_mask_BL.repeat_interleave(num_words, 0),
        labels=labels_NT,
        use_cache=False,
    ).logits
    loss_NT = F.cross_entropy(
        logits_NTV.float().transpose(1, 2), labels_NT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return -loss_NT.sum(1).view(num_sources, num_words)


def expected_values(scores_BC: Tensor, values: Sequence[float]) -> Tensor:
    """Mean of the candidates' values under the softmax of their log-likelihoods: the least-squares prediction of a number.

    value[b] = sum_c values_c exp(score[b, c]) / sum_c exp(score[b, c])

    Args:
        scores_BC: log-likelihood of each candidate.
        values: the number each candidate stands for.

    Returns:
        tensor of shape (B,).
    """
    return scores_BC.softmax(-1) @ scores_BC.new_tensor(values)


@torch.inference_mode()
def generated_ids(
    model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor, *, max_target_tokens: int, num_beams: int
) -> list[list[int]]:
    """Token ids that the model writes after every source, by beam search (greedily for one beam)."""
    output_BT: Any = model.generate(  # type: ignore[operator]  # the mix-in is not in the type
        input_ids=input_ids_BL,
        attention_mask=attention_mask_BL,
        max_new_tokens=max_target_tokens,
        num_beams=num_beams,
        do_sample=False,
    )
    ids: list[list[int]] = output_BT.tolist()
    return ids


@torch.inference_mode()
def head_outputs(model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """Logits of an encoder head for every source, float32 of shape (B, number of outputs)."""
    return model(input_ids=input_ids_BL, attention_mask=attention_mask_BL).logits.float()


def padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """The sequences as rows of an int64 tensor, filled up on the right with `value`."""
    rows = torch.full((len(sequences), max(map(len, sequences))), value)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence)
    return rows

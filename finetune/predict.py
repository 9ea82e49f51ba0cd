"""A model's answers to encoded examples: by the likelihood of label words, by free generation, or by an encoder head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spade_t5.errors import ConfigError
from spade_t5.finetune.scoring import expected_values, generated_ids, head_outputs, label_log_likelihoods, padded
from spade_t5.finetune.task import Prediction, Task

Method = Literal["likelihood", "generate", "head"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one source."""

    prediction: Prediction
    """Class index, value or text, as the metrics read it."""
    text: str | None
    """The generated text as it came; None where nothing was generated."""
    scores: dict[str, float]
    """Log-likelihood or logit of every label word, or the head's value; empty for generation."""


def label_word_ids(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a task's label words, end mark included.

    Raises:
        ConfigError: two words are the same to the tokenizer, so that their likelihoods could not tell them apart.
    """
    ids: list[list[int]] = tokenizer(list(task.label_words))["input_ids"]
    seen: dict[tuple[int, ...], str] = {}
    for word, tokens in zip(task.label_words, ids, strict=True):
        if tuple(tokens) in seen:
            raise ConfigError(
                f"tokenizer: label words {seen[tuple(tokens)]!r} and {word!r} of task {task.name} have the same tokens; "
                "use a tokenizer that knows their letters"
            )
        seen[tuple(tokens)] = word
    return ids


def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sources: Sequence[Sequence[int]],
    *,
    method: Method,
    word_ids: Sequence[Sequence[int]],
    max_target_tokens: int,
    num_beams: int,
) -> list[Answer]:
    """Answers to a batch of sources.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        task: its label words and its postprocessing.
        sources: token ids, end mark included.
        method: likelihood of label words (the most likely class; the expected value of a regression), generation, or head.
        word_ids: token ids of the label words, for likelihood.
        max_target_tokens: longest generated text.
        num_beams: beams of generation.
    """
    device = next(model.parameters()).device
    input_ids_BL = padded(sources, tokenizer.pad_token_id).to(device)
    attention_mask_BL = padded([[1] * len(source) for source in sources], 0).to(device)
    if method == "generate":
        ids = generated_ids(
            model, input_ids_BL, attention_mask_BL, max_target_tokens=max_target_tokens, num_beams=num_beams
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Answer(task.postprocess(text), text, {}) for text in texts]
    if method == "head":
        scores_BC = head_outputs(model, input_ids_BL, attention_mask_BL).cpu()
        if task.kind == "regression":
            return [Answer(value, None, {"value": value}) for value in scores_BC[:, 0].tolist()]
    else:
        scores_BC = label_log_likelihoods(model, input_ids_BL, attention_mask_BL, word_ids).cpu()
    predictions: list[Prediction]
    if task.kind == "regression":
        predictions = expected_values(scores_BC, [float(word) for word in task.label_words]).tolist()
    else:
        predictions = scores_BC.argmax(1).tolist()
    by_word = [dict(zip(task.label_words, row, strict=True)) for row in scores_BC.tolist()]
    return [Answer(prediction, None, scores) for prediction, scores in zip(predictions, by_word, strict=True)]


def length_batches(sources: Sequence[Sequence[int]], numbers: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbered sources in batches of similar length, the longest first, so that running out of memory shows at once."""
    batch: list[int] = []
    for number in sorted(numbers, key=lambda i: (-len(sources[i]), i)):
        if batch and (len(batch) + 1) * len(sources[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch

"""Text in, text out: the loop over batches that the sequence-to-sequence pipelines of transformers 4 offered."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    **generation_options: Any,
) -> list[str]:
    """Generates one output text for every input text.

    Args:
        model: an encoder-decoder with a head, in evaluation mode (dropout would make the texts random).
        tokenizer: its tokenizer, with a padding token.
        texts: inputs; nothing is cut off.
        max_new_tokens: longest output, in tokens; transformers' own default of 20 cuts summaries short.
        batch_size: texts generated together.
        generation_options: passed on to `generate`: num_beams, do_sample, temperature, ...

    Returns:
        the outputs in the order of `texts`, without special tokens.

    Raises:
        ValueError: the model cannot generate, or `num_return_sequences` is above 1.
    """
    if not isinstance(model, GenerationMixin):
        raise ValueError(f"{type(model).__name__} cannot generate: load the model with AutoModelForSeq2SeqLM")
    if generation_options.get("num_return_sequences", 1) != 1:
        raise ValueError("num_return_sequences: generate_text returns one text per input; call model.generate for more")
    outputs: list[str] = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(list(texts[start : start + batch_size]), padding=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            ids: Any = model.generate(  # type: ignore[misc]  # transformers types `self` as a protocol
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                **generation_options,
            )
        outputs.extend(tokenizer.batch_decode(ids, skip_special_tokens=True))
    return outputs

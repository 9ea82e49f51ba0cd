"""`generate_text`: text in, text out."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spade_t5 import SpadeT5Config, SpadeT5EncoderModel, SpadeT5ForConditionalGeneration
from spade_t5.hf.generation import generate_text

WORDS = ["<pad>", "</s>", "<unk>", "one", "two", "three", "four", "five"]
TEXTS = ["one two three", "four", "five four three two one", "two two"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_config() -> SpadeT5Config:
    return SpadeT5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, local_radius=3, d_state=8
    )


def make_model() -> SpadeT5ForConditionalGeneration:
    torch.manual_seed(0)
    return SpadeT5ForConditionalGeneration(make_config()).eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
def test_texts_do_not_depend_on_the_batch(options: dict[str, int]) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    outputs = generate_text(model, tokenizer, TEXTS, max_new_tokens=6, batch_size=3, **options)
    assert len(outputs) == len(TEXTS)
    assert outputs == [generate_text(model, tokenizer, [text], max_new_tokens=6, **options)[0] for text in TEXTS]
    assert any(outputs)
    assert not any(special in output for output in outputs for special in ("<pad>", "</s>"))


def test_a_model_that_copies_is_heard() -> None:
    """A few steps on one pair make the model say it."""
    model, tokenizer = make_model().train(), make_tokenizer()
    batch = tokenizer(["one two three"], return_tensors="pt")
    labels = tokenizer(["five four"], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
    assert generate_text(model.eval(), tokenizer, ["one two three"], max_new_tokens=6) == ["five four"]


def test_nothing_in_nothing_out() -> None:
    assert generate_text(make_model(), make_tokenizer(), [], max_new_tokens=3) == []


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot generate"):
        generate_text(SpadeT5EncoderModel(make_config()), make_tokenizer(), TEXTS, max_new_tokens=3)
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate_text(make_model(), make_tokenizer(), TEXTS, max_new_tokens=3, num_return_sequences=2)

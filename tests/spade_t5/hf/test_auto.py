"""The auto classes and pipelines of transformers know our models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from spade_t5 import (
    SpadeT5Config,
    SpadeT5EncoderModel,
    SpadeT5ForConditionalGeneration,
    SpadeT5ForSequenceClassification,
    SpadeT5Model,
)
from spade_t5.hf.auto import register_auto_classes
from spade_t5.testing import run_command

WORDS = ["<pad>", "</s>", "<unk>", "long", "short", "inputs", "are", "easy"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_config(**options: object) -> SpadeT5Config:
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "local_radius": 4}
    return SpadeT5Config(**{**sizes, "d_state": 8, **options})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    SpadeT5ForConditionalGeneration(make_config()).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, SpadeT5Model),
        (AutoModelForSeq2SeqLM, SpadeT5ForConditionalGeneration),
        (AutoModelForSequenceClassification, SpadeT5ForSequenceClassification),
        (AutoModelForTextEncoding, SpadeT5EncoderModel),
    ],
)
def test_auto_classes_load_our_classes(folder: Path, auto_class: type, model_class: type) -> None:
    register_auto_classes()  # a second time: nothing changes
    assert type(AutoConfig.from_pretrained(folder)) is SpadeT5Config
    assert type(auto_class.from_pretrained(folder)) is model_class
    assert type(auto_class.from_config(make_config())) is model_class


def test_a_fresh_process_loads_the_folder(folder: Path) -> None:
    script = f"""
import json, torch, spade_t5
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r})
batch = AutoTokenizer.from_pretrained({str(folder)!r})(["long inputs are easy"], return_tensors="pt")
print(json.dumps(model(**batch, decoder_input_ids=torch.tensor([[0]])).logits.flatten().tolist()))
"""
    result = run_command([sys.executable, "-c", script])
    assert result.returncode == 0, result.stderr
    model = SpadeT5ForConditionalGeneration.from_pretrained(folder)
    batch = make_tokenizer()(["long inputs are easy"], return_tensors="pt")
    expected = model(**batch, decoder_input_ids=torch.tensor([[0]])).logits.flatten()
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout.splitlines()[-1])), expected)


def test_text_classification_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = make_config(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model, tokenizer = SpadeT5ForSequenceClassification(config).eval(), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    texts = ["long inputs are easy", "short"]
    found = classify(texts, batch_size=2, top_k=None)
    for text, scores in zip(texts, found, strict=True):
        expected = model(**tokenizer([text], return_tensors="pt")).logits[0].softmax(-1)
        by_label = {entry["label"]: entry["score"] for entry in scores}
        assert by_label == pytest.approx({"bad": expected[0].item(), "good": expected[1].item()}, abs=1e-6)


@pytest.mark.parametrize("loaded", [True, False], ids=["encoder", "folder"])
def test_feature_extraction_pipeline(folder: Path, loaded: bool) -> None:
    encoder = SpadeT5EncoderModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extract = pipeline("feature-extraction", model=encoder if loaded else str(folder), tokenizer=tokenizer)
    features = torch.tensor(extract("long inputs are easy"))
    expected = encoder(**tokenizer(["long inputs are easy"], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, expected)

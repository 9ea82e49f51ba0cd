from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification
from spade_t5.config import from_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.model import initial_model, initial_tokenizer
from spade_t5.finetune.registry import TASKS

TINY = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "local_radius": 3,
}


def config(**values: Any) -> FinetuneConfig:
    training = {"steps": 1, "global_batch_rows": 1, "micro_batch_rows": 1, "seed": 5}
    return from_mapping(FinetuneConfig, {"run_dir": "unused", "task": {"name": "sst2"}, "training": training, **values})


@pytest.fixture
def pretrained(tmp_path: Path, word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]) -> Path:
    torch.manual_seed(1)
    SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", vocab_size=128, **TINY)).save_pretrained(
        tmp_path / "model"
    )
    word_tokenizer(["a", "b"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("task_name", ["sst2", "stsb"])
def test_a_pretrained_encoder_keeps_its_weights_and_gets_a_fresh_head(pretrained: Path, task_name: str) -> None:
    settings = config(
        model={"init_from": str(pretrained)}, mode="encoder-head", dropout_rate=0.25, task={"name": task_name}
    )
    tokenizer = initial_tokenizer(settings)
    model = initial_model(settings, settings.task.build(), tokenizer)
    assert isinstance(model, SpadeT5ForSequenceClassification)
    assert (model.config.dropout_rate, model.config.classifier_dropout) == (0.25, 0.25)
    old = SpadeT5ForConditionalGeneration.from_pretrained(pretrained).encoder.state_dict()
    new = model.encoder.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert model.config.num_labels == (1 if task_name == "stsb" else 2)
    assert model.config.problem_type == ("regression" if task_name == "stsb" else "single_label_classification")
    if task_name == "sst2":
        assert model.config.id2label == {0: "negative", 1: "positive"}
    # the head is random, but the same in every process
    again = initial_model(settings, settings.task.build(), tokenizer)
    assert torch.equal(model.classification_head.dense.weight, again.classification_head.dense.weight)
    assert model.classification_head.dense.weight.std() > 0.01


def test_dropout_is_the_runs_in_text_to_text_mode(pretrained: Path) -> None:
    settings = config(model={"init_from": str(pretrained)}, dropout_rate=0.25)
    model = initial_model(settings, settings.task.build(), initial_tokenizer(settings))
    assert isinstance(model, SpadeT5ForConditionalGeneration)
    assert model.config.dropout_rate == 0.25
    old = SpadeT5ForConditionalGeneration.from_pretrained(pretrained)
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), model.parameters(), strict=True))
    # it acts: two passes in training mode differ, in evaluation mode they do not
    inputs = {"input_ids": torch.tensor([[3, 4, 1]]), "labels": torch.tensor([[3, 1]])}
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_scratch_models_follow_the_seed_and_the_tokenizer(pretrained: Path) -> None:
    settings = config(model={"preset": "tiny", **TINY}, tokenizer=str(pretrained))
    tokenizer = initial_tokenizer(settings)
    one, two = (initial_model(settings, settings.task.build(), tokenizer) for _ in range(2))
    assert one.config.vocab_size == 128
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_tokenizer_too_large_for_the_model_is_refused(
    pretrained: Path, tmp_path: Path, word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]
) -> None:
    word_tokenizer([f"w{i}" for i in range(200)]).save_pretrained(tmp_path / "large")
    settings = config(model={"init_from": str(pretrained)}, tokenizer=str(tmp_path / "large"))
    with pytest.raises(ConfigError, match="128 is too small for the tokenizer"):
        initial_model(settings, settings.task.build(), initial_tokenizer(settings))


def test_every_task_can_be_named_in_a_config(tmp_path: Path) -> None:
    files = {"name": "files", "train": str(tmp_path / "a.jsonl")}
    needed = {
        "scisumm": {"source": files},
        "summarization": {"source": files},
        "text-classification": {"source": files, "labels": ["a", "b"]},
    }
    for name in TASKS:
        task = config(model={"init_from": "x/y"}, task={"name": name, **needed.get(name, {})}).task.build()
        assert task.name == name
        assert bool(task.label_words) == (task.kind != "generation")

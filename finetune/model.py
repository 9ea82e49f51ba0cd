"""The model that a fine-tuning run starts from."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from spade_t5.checkpoint import load_weights_into
from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.task import Task
from spade_t5.hf.folders import MODEL_FILES, local_folder
from spade_t5.hf.loading import build_model, find_checkpoint, load_exported, load_tokenizer_of, resolve_model_config
from spade_t5.hf.tokenizer import check_vocabulary, load_tokenizer, model_vocab_size
from spade_t5.modeling import SpadeT5ForConditionalGeneration, SpadeT5PreTrainedModel


def initial_tokenizer(config: FinetuneConfig) -> PreTrainedTokenizerFast:
    """The tokenizer that the config names, or the one of the model it starts from."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    return load_tokenizer_of(config.model["init_from"])


def initial_model(config: FinetuneConfig, task: Task, tokenizer: PreTrainedTokenizerFast) -> SpadeT5PreTrainedModel:
    """The model before its first step: from scratch or pretrained, with the run's dropout and, in encoder-head mode, a fresh head.

    Raises:
        ConfigError: the `model` section is wrong, the tokenizer does not fit, or the task has no use for a head.
    """
    model_config = resolve_model_config(config.model, model_vocab_size(tokenizer))
    check_vocabulary(tokenizer, model_config.vocab_size)
    model_config.dropout_rate = config.dropout_rate
    cls: type[SpadeT5PreTrainedModel] = SpadeT5ForConditionalGeneration
    if config.mode == "encoder-head":
        cls = SpadeT5ForSequenceClassification
        for name, value in head_fields(task, config.dropout_rate).items():
            setattr(model_config, name, value)
    init_from = config.model.get("init_from")
    checkpoint = None if init_from is None else find_checkpoint(Path(init_from))
    if init_from is None or checkpoint is not None:
        model = build_model(cls, model_config, seed=config.training.seed)
        if checkpoint is not None:
            load_weights_into(model, checkpoint)
        return model
    return load_exported(local_folder(init_from, files=MODEL_FILES), cls, model_config, seed=config.training.seed)


def head_fields(task: Task, dropout_rate: float) -> dict[str, Any]:
    """Fields of the model's config that describe the head of a task, in Hugging Face's names."""
    num_outputs = task.num_outputs
    fields: dict[str, Any] = {"classifier_dropout": dropout_rate, "num_labels": num_outputs}
    if task.kind == "regression":
        return {**fields, "problem_type": "regression"}
    words = dict(enumerate(task.label_words))
    return {
        **fields,
        "id2label": words,
        "label2id": {word: index for index, word in words.items()},
        "problem_type": "single_label_classification",
    }

"""What a run reads on a node, as hashes: its settings, tokenizer and stores. And how much it will write."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from spade_t5.checkpoint import checkpoint_bytes
from spade_t5.checkpoint.manifest import content_hash
from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.config import to_mapping
from spade_t5.errors import UserError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.model import head_fields, initial_tokenizer
from spade_t5.hf.loading import resolve_model_config
from spade_t5.hf.tokenizer import load_tokenizer, model_vocab_size, tokenizer_hash
from spade_t5.messages import one_line
from spade_t5.modeling import SpadeT5ForConditionalGeneration, SpadeT5PreTrainedModel
from spade_t5.pretrain.corpora import HubCorpus
from spade_t5.pretrain.data import StoreData
from spade_t5.pretrain.run import PretrainConfig, model_config_of
from spade_t5.pretrain.store import TokenStore
from spade_t5.training import TrainingConfig

RunConfig = PretrainConfig | FinetuneConfig


def settings(config: RunConfig) -> dict[str, Any]:
    """Hash of the settings, which a file on each node may say differently."""
    return {"settings": content_hash(to_mapping(config))}


def tokenizer(config: RunConfig) -> dict[str, Any]:
    """Hash of the tokenizer, and that of the one a store was made with."""
    facts = {"tokenizer": tokenizer_hash(_tokenizer_of(config))}
    if isinstance(config, PretrainConfig) and isinstance(config.data, StoreData):
        facts["tokenizer_of_store"] = TokenStore.open(config.data.stores[0].store).tokenizer.hash
    return facts


def text(config: RunConfig) -> dict[str, Any]:
    """What stands for the text of pretraining: the hash of each store's manifest, or of a stream's list of files; or why there is none.

    The files of a store are there and have their sizes then; whether their content is right `spade-t5 verify` says. The hub is not asked.
    """
    if isinstance(config, FinetuneConfig):
        return {}
    if not isinstance(config.data, StoreData):
        corpus = config.data.corpus
        if isinstance(corpus, HubCorpus) and not Path(corpus.dataset).is_dir():
            return {}
        return {"text": {corpus.name: {"hash": content_hash(corpus.open().fingerprint)}}}
    found: dict[str, Any] = {}
    needed_bytes = 0
    for entry in config.data.stores:
        try:
            store = TokenStore.open(entry.store)
        except UserError as error:
            found[str(entry.store)] = {"problem": one_line(str(error))}
            continue
        found[str(entry.store)] = {"hash": store.identity}
        staging = config.data.staging_dir
        if staging is not None and not (staging / f"{entry.store.resolve().name}-{store.identity[:16]}").exists():
            needed_bytes += sum(num_bytes for num_bytes, _ in store.files().values())
    return {"text": found, "staging_needed_bytes": needed_bytes}


def checkpoints(config: RunConfig) -> dict[str, Any]:
    """Size of a checkpoint in bytes, from the shapes of the model alone, and how many a run folder comes to hold."""
    vocab_size = model_vocab_size(_tokenizer_of(config))
    if isinstance(config, PretrainConfig):
        model_config = model_config_of(config, vocab_size)
    else:
        model_config = resolve_model_config(config.model, vocab_size)
    cls: type[SpadeT5PreTrainedModel] = SpadeT5ForConditionalGeneration
    if isinstance(config, FinetuneConfig) and config.mode == "encoder-head":
        cls = SpadeT5ForSequenceClassification
        for name, value in head_fields(config.task.build(), config.dropout_rate).items():
            setattr(model_config, name, value)
    with torch.device("meta"):
        model = cls(model_config)
    return {
        "checkpoint_bytes": checkpoint_bytes(
            model.parameters(),
            num_moments=config.training.optimizer.num_moments,
            keeps_average=config.training.ema_decay is not None,
        ),
        "checkpoints_held": checkpoints_held(config.training),
    }


def checkpoints_held(training: TrainingConfig) -> int:
    """How many checkpoints lie in the run folder at most: those that are kept, and one that is being written."""
    saves = 1 if training.save_every_steps is None else math.ceil(training.steps / training.save_every_steps)
    kept = training.keep_checkpoints + training.keep_best
    if training.keep_every_steps is not None:
        kept += training.steps // training.keep_every_steps
    return max(min(saves, kept + 1), 2)  # a run does not start without room for two


def _tokenizer_of(config: RunConfig) -> PreTrainedTokenizerFast:
    if isinstance(config, FinetuneConfig):
        return initial_tokenizer(config)
    if isinstance(config.data, StoreData):
        # Opened first, so that of a store that is not there the same is said as by `text`.
        return load_tokenizer(TokenStore.open(config.data.stores[0].store).path / "tokenizer")
    return load_tokenizer(config.data.tokenizer, num_sentinels=config.data.num_sentinels)

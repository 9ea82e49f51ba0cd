"""One pretraining run: a token store, an objective and a model, handed to the engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spade_t5.config import to_mapping
from spade_t5.hf.loading import build_model, load_model, resolve_model_config
from spade_t5.hf.tokenizer import check_vocabulary, load_tokenizer, tokenizer_hash
from spade_t5.layers.head import TokenLossConfig
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.pretrain.objectives import SpanCorruption
from spade_t5.pretrain.rows import SpanCorruptionRows
from spade_t5.pretrain.store import TokenStore
from spade_t5.training import Seq2SeqObjective, TrainingConfig, distributed
from spade_t5.training.engine import Trainer, start
from spade_t5.training.run_folder import find_resume_point, open_run_folder, provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainDataConfig:
    """What a model is pretrained on."""

    store: Path
    """Token store made by `spade-t5 prepare`; the tokenizer lies in it."""
    max_eval_rows: int | None = 256
    """Held-out rows that an evaluation uses; null: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A whole pretraining run."""

    run_dir: Path
    """Folder of the run, the same for all ranks."""
    model: dict[str, Any]
    """`preset`, and fields of SpadeT5Config that replace those of the preset; or `init_from`, the path of a model to continue."""
    data: PretrainDataConfig
    """Token store."""
    objective: SpanCorruption = field(default_factory=SpanCorruption)
    """How tokens become inputs and targets."""
    loss: TokenLossConfig = field(default_factory=TokenLossConfig)
    """z-loss and label smoothing of training."""
    training: TrainingConfig
    """Steps, batches, optimizer, precision, saving."""


def pretrain(config: PretrainConfig, *, resume: str = "auto") -> Path:
    """Trains, or goes on training, and returns the run folder.

    Args:
        config: the run.
        resume: "auto", "none", or the path of a checkpoint or run folder.

    Raises:
        ConfigError: the settings contradict each other, the data, or the checkpoint to resume from.
        DataError: store or checkpoint are damaged.
        StopRequestedError: a signal asked to stop; a checkpoint was saved.
    """
    resume_from = find_resume_point(config.run_dir, resume)
    store = TokenStore.open(config.data.store)
    tokenizer = load_tokenizer(store.path / "tokenizer")
    store.check_tokenizer(tokenizer_hash(tokenizer))
    model_config = resolve_model_config(config.model, store.tokenizer.vocab_size)
    check_vocabulary(tokenizer, model_config.vocab_size)
    seed = config.training.seed
    train_rows = SpanCorruptionRows(store, "train", config.objective, seed=seed)
    eval_rows = SpanCorruptionRows(
        store, "validation", config.objective, seed=seed, evaluation=True, max_rows=config.data.max_eval_rows
    )
    init_from = config.model.get("init_from")
    if init_from is not None:
        model = load_model(init_from, SpadeT5ForConditionalGeneration)
    else:
        model = build_model(SpadeT5ForConditionalGeneration, model_config, seed=seed)
    start(config.training)
    resolved = {**to_mapping(config), "tokenizer_hash": store.tokenizer.hash}
    open_run_folder(config.run_dir, resolved, resume_from)
    if distributed.is_main():
        tokenizer.save_pretrained(config.run_dir / "tokenizer")
    trainer = Trainer(
        model=model,
        objective=Seq2SeqObjective(config.loss),
        train_rows=train_rows,
        eval_rows=eval_rows,
        config=config.training,
        run_dir=config.run_dir,
        facts={
            "config": resolved,
            "model_class": type(model).__name__,
            "model_config": model.config.to_dict(),
            "initialised_from": init_from,
            "provenance": provenance(),
        },
    )
    if resume_from is not None:
        trainer.resume(resume_from)
    trainer.fit()
    return config.run_dir

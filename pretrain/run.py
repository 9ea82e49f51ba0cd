"""One pretraining run: data, an objective and a model, handed to the engine."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spade_t5.anatomy import part_of
from spade_t5.config import to_mapping
from spade_t5.configuration import SpadeT5Config
from spade_t5.errors import ConfigError
from spade_t5.flops import counter_of_run
from spade_t5.hf.loading import build_model, continue_model, resolve_model_config
from spade_t5.hf.tokenizer import check_vocabulary, model_vocab_size, save_tokenizer, tokenizer_hash
from spade_t5.layers.head import TokenLossConfig
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.pretrain.data import StoreData
from spade_t5.pretrain.objectives import ObjectiveConfig, SpanCorruption
from spade_t5.pretrain.streaming import StreamingData
from spade_t5.training import Seq2SeqObjective, TrainingConfig, distributed
from spade_t5.training.agreement import on_every_rank
from spade_t5.training.engine import Trainer, start
from spade_t5.training.provenance import provenance
from spade_t5.training.run_folder import AUTO, Resume, RunFolder, open_run_folder

logger = logging.getLogger("spade_t5")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A whole pretraining run."""

    run_dir: Path
    """Folder of the run, the same for all ranks."""
    model: dict[str, Any]
    """`preset`, and fields of SpadeT5Config that replace those of the preset; or `init_from`, the path of a model to continue, with
    `dt_min` and `dt_max` if its memory is to reach further."""
    data: StoreData | StreamingData
    """Text that it is trained on."""
    objective: ObjectiveConfig = field(default_factory=SpanCorruption)
    """How tokens become inputs and targets."""
    loss: TokenLossConfig = field(default_factory=TokenLossConfig)
    """z-loss and label smoothing of training."""
    training: TrainingConfig
    """Steps, batches, optimizer, precision, saving."""


def model_config_of(config: PretrainConfig, vocab_size: int) -> SpadeT5Config:
    """The model that a run trains, from scratch or continued, with a memory that reaches further if the run says so.

    Args:
        config: the run.
        vocab_size: of its tokenizer.

    Raises:
        ConfigError: the model to continue is not there, or the run sets what it cannot.
    """
    return resolve_model_config(config.model, vocab_size, may_change=("dt_min", "dt_max"))


def pretrain(config: PretrainConfig, *, resume: Resume = AUTO) -> Path:
    """Trains, or goes on training, and returns the run folder.

    Args:
        config: the run.
        resume: where it goes on, and what may have changed.

    Raises:
        ConfigError: the settings contradict each other, the data, or the checkpoint to resume from; or another run has the folder.
        DataError: data or checkpoint are damaged.
        RunAbortedError: the run cannot go on.
        StopRequestedError: a signal asked to stop; a checkpoint was saved.
    """
    start(config.training)
    with open_run_folder(config.run_dir, resume) as folder:
        _pretrain_in(folder, config)
    return config.run_dir


def _pretrain_in(folder: RunFolder, config: PretrainConfig) -> None:
    data = on_every_rank(lambda: config.data.open(config.objective, seed=config.training.seed))
    tokenizer = data.tokenizer
    model_config = model_config_of(config, model_vocab_size(tokenizer))
    check_vocabulary(tokenizer, model_config.vocab_size)
    for rank, fingerprint in enumerate(distributed.gather_objects(data.fingerprint)):
        if fingerprint != data.fingerprint:
            raise ConfigError(
                f"data: rank {rank} reads other data than rank {distributed.rank()}; give every node the same stores or files"
            )
    resolved = {
        **to_mapping(config),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "data_fingerprint": data.fingerprint,
    }
    folder.check_settings(resolved, PretrainConfig, num_steps=config.training.steps)
    if folder.is_finished(config.training.steps):
        logger.info("nothing to do: %s is the last checkpoint of this run", folder.resume_from)
        return
    init_from = config.model.get("init_from")
    if init_from is not None:
        model = on_every_rank(lambda: continue_model(init_from, SpadeT5ForConditionalGeneration, model_config))
    else:
        model = build_model(SpadeT5ForConditionalGeneration, model_config, seed=config.training.seed)
    folder.begin(resolved)
    folder.write(lambda: save_tokenizer(tokenizer, folder.path / "tokenizer"))
    trainer = Trainer(
        model=model,
        objective=Seq2SeqObjective(config.loss, data.groups),
        train_rows=data.train_rows,
        eval_rows=data.eval_rows,
        config=config.training,
        run_dir=folder.path,
        before_publishing=folder.check_lease,
        count_flops=counter_of_run(model.config, config.training, has_decoder=True).batch,
        part_of=part_of,
        facts={
            "config": resolved,
            "model_class": type(model).__name__,
            "model_config": model.config.to_dict(),
            "initialised_from": resolved["model"].get("init_from"),
            "started_from": folder.started_from,
            "provenance": provenance(),
        },
    )
    if folder.resume_from is not None:
        trainer.resume(folder.resume_from, is_verified=True)
    trainer.fit()

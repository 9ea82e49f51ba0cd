"""One fine-tuning run: rows of a task and a model, handed to the engine; then predictions, scores and an export.

The run folder is that of pretraining plus `predictions/<task>-<split>.jsonl`, `scores.json` and `model/`, the exported folder.
"""

import dataclasses
import logging
import shutil
from pathlib import Path

from spade_t5.anatomy import part_of
from spade_t5.config import to_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.evaluate import evaluate_model
from spade_t5.finetune.model import initial_model, initial_tokenizer
from spade_t5.finetune.predict import label_word_ids
from spade_t5.finetune.rows import EncodedExamples, ExampleRows, RowsConfig, encode_examples, pack_examples
from spade_t5.finetune.task import Task
from spade_t5.flops import counter_of_run
from spade_t5.hf.export import export_run
from spade_t5.hf.tokenizer import save_tokenizer, tokenizer_hash
from spade_t5.training import ClassificationObjective, Objective, Seq2SeqObjective, TrainingConfig
from spade_t5.training.agreement import on_every_rank, on_main
from spade_t5.training.engine import Trainer, start
from spade_t5.training.provenance import provenance
from spade_t5.training.run_folder import AUTO, Resume, RunFolder, open_run_folder

logger = logging.getLogger("spade_t5")


def finetune(config: FinetuneConfig, *, resume: Resume = AUTO) -> Path:
    """Fine-tunes, or goes on fine-tuning, then evaluates and exports; returns the run folder.

    Args:
        config: the run.
        resume: where it goes on, and what may have changed.

    Raises:
        ConfigError: the settings contradict each other, the data, or the checkpoint to resume from; or another run has the folder.
        DataError: rows or a checkpoint are damaged, or a label is outside the task.
        RunAbortedError: the run cannot go on.
        StopRequestedError: a signal asked to stop; a checkpoint was saved.
    """
    start(config.training)
    with open_run_folder(config.run_dir, resume) as folder:
        _finetune_in(folder, config)
    return config.run_dir


def _finetune_in(folder: RunFolder, config: FinetuneConfig) -> None:
    task = config.task.build()
    tokenizer = initial_tokenizer(config)
    head_outputs = task.num_outputs if config.mode == "encoder-head" else None
    if head_outputs is None and task.label_words:
        label_word_ids(task, tokenizer)  # a tokenizer that cannot tell the answers apart is refused before training
    train, held_out = on_every_rank(
        lambda: [
            encode_examples(task, task.examples(split, limit), tokenizer, config.rows)
            for split, limit in (
                ("train", config.max_train_examples),
                (config.evaluation.split, config.evaluation.max_examples),
            )
        ]
    )
    seed = config.training.seed
    train_rows, eval_rows = (
        ExampleRows(
            examples,
            make_rows(examples, config.rows, task, seed),
            pad_token_id=tokenizer.pad_token_id,
            num_outputs=head_outputs,
            shuffle_seed=shuffle_seed,
        )
        for examples, shuffle_seed in ((train, seed), (held_out, None))
    )
    training = bounded_by_epochs(config.training, config.epochs, len(train_rows.rows))
    resolved = {
        **to_mapping(config),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "data_fingerprint": {"train": train.compute_fingerprint(), "held_out": held_out.compute_fingerprint()},
    }
    folder.check_settings(resolved, FinetuneConfig, num_steps=training.steps)
    exported = folder.path / "model"
    if folder.is_finished(training.steps) and exported.is_dir():
        logger.info(
            "nothing to do: %s is the last checkpoint of this run, and %s its export", folder.resume_from, exported
        )
        return
    model = on_every_rank(lambda: initial_model(config, task, tokenizer))
    folder.begin(resolved)
    folder.write(lambda: _remove(exported))  # of this run, before it goes on: what is there later is of its end
    folder.write(lambda: save_tokenizer(tokenizer, folder.path / "tokenizer"))
    objective: Objective = (
        Seq2SeqObjective(config.loss) if head_outputs is None else ClassificationObjective(head_outputs)
    )
    trainer = Trainer(
        model=model,
        objective=objective,
        train_rows=train_rows,
        eval_rows=eval_rows,
        config=training,
        run_dir=folder.path,
        before_publishing=folder.check_lease,
        count_flops=counter_of_run(model.config, training, has_decoder=head_outputs is None).batch,
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
    evaluate_model(folder.path, task, config=config.evaluation, rows=config.rows, out=folder.path)
    on_main(lambda: export_run(folder.path, exported))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def make_rows(examples: EncodedExamples, config: RowsConfig, task: Task, seed: int) -> list[list[int]]:
    """Which examples share a row: each alone, or packed."""
    if not config.packing:
        return [[i] for i in range(len(examples))]
    row_tokens = config.row_tokens or config.max_source_tokens or task.max_source_tokens
    return pack_examples(examples, row_tokens=row_tokens, seed=seed)


def bounded_by_epochs(training: TrainingConfig, epochs: float | None, rows_per_epoch: int) -> TrainingConfig:
    """The engine's settings with no more steps than the epochs take.

    Raises:
        ConfigError: the schedule does not fit into so few.
    """
    if epochs is None:
        return training
    steps = max(1, training.step_rows.num_steps(epochs * rows_per_epoch))
    try:
        return dataclasses.replace(training, steps=min(training.steps, steps))
    except ValueError as error:
        raise ConfigError(f"epochs: {epochs} are {steps} steps: training.{error}") from None

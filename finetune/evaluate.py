"""Runs a model over a split of a task: predictions, saved line by line, and their scores beside a trivial baseline.

A classification or regression task in text-to-text mode is answered by the likelihood of its label words or by free
generation; a generation task always by generation; a model with an encoder head by the head. Several ranks share the
examples and the main rank writes the files.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spade_t5.checkpoint import read_state
from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.errors import ConfigError
from spade_t5.finetune.metrics import baseline, compute
from spade_t5.finetune.predict import Answer, Method, answer_batch, label_word_ids, length_batches
from spade_t5.finetune.rows import RowsConfig, encode_examples
from spade_t5.finetune.task import UNKNOWN_CLASS, Example, Task
from spade_t5.hf.export import SCORES_FILE
from spade_t5.hf.loading import find_checkpoint, load_config, load_model, load_tokenizer_of
from spade_t5.modeling import SpadeT5ForConditionalGeneration, SpadeT5PreTrainedModel
from spade_t5.training import distributed
from spade_t5.training.agreement import write_on_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is predicted, and how."""

    split: str = "validation"
    """Split whose rows are predicted."""
    method: Literal["likelihood", "generate"] = "likelihood"
    """How text-to-text mode answers a task with label words: the most likely word, or free generation."""
    num_beams: int = 1
    """Beams of generation; 1 is greedy."""
    max_examples: int | None = None
    """Only the first so many rows; null: all."""
    batch_tokens: int = 16_384
    """Source tokens, padding included, that go through the model at once; an example always does, however long."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("num_beams", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples: {self.max_examples} must be at least 1, or null for all")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome of an evaluation."""

    summary: dict[str, Any]
    """Scores, baseline and circumstances: the content of a scores file."""
    records: list[dict[str, Any]]
    """One JSON object for each example: the lines of a predictions file."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    config: EvaluationConfig,
    rows: RowsConfig,
) -> Evaluation:
    """Predicts and scores a split of a task; every rank takes its share of the examples and gets the whole result.

    Args:
        model: an encoder-decoder, or an encoder with a classification head, on this rank's device.
        tokenizer: the model's.
        task: what to predict.
        config: split, method and sizes.
        rows: limits of source and target.

    Raises:
        ConfigError: the model's head or the tokenizer does not fit the task.
        DataError: the split is empty or has foreign labels.
    """
    method = _method(model, task, config)
    word_ids = label_word_ids(task, tokenizer) if method == "likelihood" else []
    examples = task.examples(config.split, config.max_examples)
    encoded = encode_examples(task, examples, tokenizer, rows)
    model.eval()
    own = range(distributed.rank(), len(examples), distributed.world_size())
    answers: dict[int, Answer] = {}
    for batch in length_batches(encoded.sources, own, config.batch_tokens):
        outputs = answer_batch(
            model,
            tokenizer,
            task,
            [encoded.sources[i] for i in batch],
            method=method,
            word_ids=word_ids,
            max_target_tokens=rows.max_target_tokens or task.max_target_tokens,
            num_beams=config.num_beams,
        )
        answers.update(zip(batch, outputs, strict=True))
        logger.debug("task %s: %d of %d rows predicted", task.name, len(answers), len(own))
    for others in distributed.gather_objects(answers):
        answers.update(others)
    in_order = [answers[i] for i in range(len(examples))]
    summary = _summary(task, config, method, examples, in_order) | {"num_cut_sources": encoded.num_cut_sources}
    return Evaluation(summary, [_record(i, *pair) for i, pair in enumerate(zip(examples, in_order, strict=True))])


def evaluate_model(
    path: str | Path, task: Task, *, config: EvaluationConfig, rows: RowsConfig, out: Path | None = None
) -> dict[str, Any]:
    """Scores the model that `path` names on a split of a task, by its head if it was saved with one.

    Args:
        path: run folder, checkpoint, exported folder, or a name on the hub.
        task: what to predict.
        config: split, method and sizes.
        rows: limits of source and target.
        out: folder for `predictions/<task>-<split>.jsonl` and `scores.json`; None writes nothing.

    Returns:
        The scores, as written to `scores.json`.

    Raises:
        ConfigError: there is no model, its head or tokenizer does not fit the task, or `out` cannot be written.
        DataError: the split is empty or has foreign labels.
    """
    has_head = saved_class(path) == SpadeT5ForSequenceClassification.__name__
    cls: type[SpadeT5PreTrainedModel] = (
        SpadeT5ForSequenceClassification if has_head else SpadeT5ForConditionalGeneration
    )
    model = load_model(path, cls, device=distributed.device())
    result = evaluate(model, load_tokenizer_of(path), task, config=config, rows=rows)
    if distributed.is_main():
        for line in score_lines(result.summary):
            logger.info("%s", line)
    if out is not None:
        write_on_main("out", out, lambda: _write(result, out, f"{task.name}-{config.split}.jsonl"))
    return result.summary


def _write(result: Evaluation, out: Path, predictions: str) -> None:
    lines = (json.dumps(record, ensure_ascii=False) for record in result.records)
    write_text(out / "predictions" / predictions, "".join(f"{line}\n" for line in lines))
    write_text(out / SCORES_FILE, json.dumps(result.summary, indent=1) + "\n")


def saved_class(path: str | Path) -> str:
    """Name of the model class that was saved where `path` points."""
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is not None:
        return str(read_state(checkpoint)["model_class"])
    return (load_config(path).architectures or [SpadeT5ForConditionalGeneration.__name__])[0]


def score_lines(summary: dict[str, Any]) -> list[str]:
    """The scores as text: one line for the model, one for the baseline, one for each note."""
    rows = f"{summary['task']}, {summary['split']}, {summary['num_examples']} rows"
    lines = [f"{rows}, by {summary['method']}: {_values(summary['metrics'])}"]
    if summary["baseline"] is not None:
        lines.append(f"{rows}, baseline ({summary['baseline']['rule']}): {_values(summary['baseline']['metrics'])}")
    return lines + [f"{rows}: {note}" for note in summary["notes"]]


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _method(model: PreTrainedModel, task: Task, config: EvaluationConfig) -> Method:
    if not model.can_generate():
        if model.config.num_labels != task.num_outputs:
            raise ConfigError(
                f"task {task.name}: needs a head of {task.num_outputs} outputs, the model has {model.config.num_labels}; "
                "evaluate it on the task it was fine-tuned on"
            )
        return "head"
    return "generate" if task.kind == "generation" else config.method


def _record(number: int, example: Example, answer: Answer) -> dict[str, Any]:
    return {
        "row": number,
        "source_sha256": hashlib.sha256(example.source.encode()).hexdigest(),
        "prediction": answer.prediction,
        "reference": example.reference,
        "text": answer.text,
        "scores": answer.scores,
    }


def _summary(
    task: Task, config: EvaluationConfig, method: Method, examples: Sequence[Example], answers: Sequence[Answer]
) -> dict[str, Any]:
    scores = compute(task.metrics, [a.prediction for a in answers], [e.reference for e in examples])
    trivial = baseline(task, [] if task.kind == "generation" else task.examples("train"), examples)
    notes = list(scores.notes)
    num_unknown = sum(answer.prediction == UNKNOWN_CLASS for answer in answers)
    if method == "generate" and num_unknown:
        notes.append(f"{num_unknown} of {len(answers)} generated texts are no label of the task")
    return {
        "task": task.name,
        "split": config.split,
        "method": method,
        "num_beams": config.num_beams if method == "generate" else None,
        "num_examples": len(examples),
        "max_examples": config.max_examples,
        "metrics": scores.values,
        "average": scores.average,
        "baseline": None
        if trivial is None
        else {"rule": trivial.rule, "metrics": trivial.scores.values, "notes": trivial.scores.notes},
        "notes": notes,
    }


def _values(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())

"""The config trees of fine-tuning and of evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spade_t5.checkpoint import read_state
from spade_t5.config import apply_overrides, from_mapping, merge
from spade_t5.errors import ConfigError
from spade_t5.finetune.evaluate import EvaluationConfig
from spade_t5.finetune.registry import TASKS, TaskConfig
from spade_t5.finetune.rows import RowsConfig
from spade_t5.hf.loading import find_checkpoint
from spade_t5.layers.head import TokenLossConfig
from spade_t5.training import TrainingConfig

Mode = Literal["text-to-text", "encoder-head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One fine-tuning run: a task, a model to start from, and how it is trained and scored."""

    run_dir: Path
    """Folder of the run, the same for all ranks."""
    task: TaskConfig
    """The task and the source of its rows."""
    model: dict[str, Any]
    """`init_from`, the path of a run, checkpoint or exported model; or `preset`, and fields of SpadeT5Config, from scratch."""
    tokenizer: str | None = None
    """Folder, SentencePiece `.model` file or name; null: the one saved with `model.init_from`."""
    mode: Mode = "text-to-text"
    """text-to-text writes the answer; encoder-head puts a classifier on the encoder."""
    dropout_rate: float = 0.1
    """Dropout while fine-tuning, in the layers and in the head; the models are pretrained without."""
    rows: RowsConfig = field(default_factory=RowsConfig)
    """Lengths and packing."""
    epochs: float | None = None
    """Passes over the training rows; the run ends here or after `training.steps`, whichever comes first. Null: steps alone."""
    max_train_examples: int | None = None
    """Train on the first so many rows of the data; null: all."""
    loss: TokenLossConfig = field(default_factory=TokenLossConfig)
    """z-loss and label smoothing of training in text-to-text mode."""
    training: TrainingConfig
    """The engine's settings."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is predicted and scored at the end; its split also gives the held-out loss."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate: {self.dropout_rate} must be at least 0 and below 1")
        if self.mode == "encoder-head" and self.loss != TokenLossConfig():
            raise ValueError(
                "loss: z_loss and label_smoothing belong to mode text-to-text; leave them out with encoder-head"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs: {self.epochs} must be positive, or null")
        if self.max_train_examples is not None and self.max_train_examples < 1:
            raise ValueError(f"max_train_examples: {self.max_train_examples} must be at least 1, or null for all")
        if self.tokenizer is None and self.model.get("init_from") is None:
            raise ValueError("tokenizer: required with model.preset; give a folder, a .model file or a name on the hub")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """One evaluation of a model that is already trained."""

    task: TaskConfig
    """The task and the source of its rows."""
    rows: RowsConfig = field(default_factory=RowsConfig)
    """Lengths."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is predicted and scored."""


def evaluate_config(path: str | Path, task_name: str | None, words: Sequence[str]) -> EvaluateConfig:
    """What to evaluate the model at `path` on: a fine-tuning run brings its own settings, the command line goes over them.

    Args:
        path: run folder, checkpoint, exported folder, or a name on the hub.
        task_name: name of the task; None: the one a run was fine-tuned on.
        words: `key=value` settings, such as `task.source.name=folder`.

    Raises:
        ConfigError: no task is known, or a setting is wrong.
    """
    checkpoint = find_checkpoint(Path(path))
    saved = {} if checkpoint is None else read_state(checkpoint)["config"]
    mapping = {key: saved[key] for key in ("task", "rows", "evaluation") if "mode" in saved}
    if task_name is not None:
        mapping = merge(mapping, {"task": {"name": task_name}})
    mapping = apply_overrides(mapping, words)
    if "task" not in mapping:
        raise ConfigError(f"--task: {path} was not fine-tuned here, so name the task: {', '.join(sorted(TASKS))}")
    return from_mapping(EvaluateConfig, mapping)

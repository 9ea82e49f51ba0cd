"""The training engine that pretraining and fine-tuning share; the engine itself is `spade_t5.training.engine.Trainer`."""

from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import EMPTY_ROW, Batch, RowSource
from spade_t5.training.objectives import ClassificationObjective, Objective, Seq2SeqObjective

__all__ = [
    "EMPTY_ROW",
    "Batch",
    "ClassificationObjective",
    "DeepSpeedConfig",
    "Objective",
    "RowSource",
    "Seq2SeqObjective",
    "TrainingConfig",
]

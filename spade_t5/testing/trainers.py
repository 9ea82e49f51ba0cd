"""A trainer of a very small model on random tokens, for tests of the engine in this process and on ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.hf.loading import build_model
from spade_t5.training.config import TrainingConfig
from spade_t5.training.data import EMPTY_ROW, Batch, NumberedRows
from spade_t5.training.engine import Trainer
from spade_t5.training.objectives import Objective, Seq2SeqObjective
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.reporting import read_metrics

VOCAB_SIZE, INPUTS_LENGTH, TARGETS_LENGTH = 50, 12, 8
SIZE = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}


class RandomRows(NumberedRows):
    """Row n is drawn from seed n: 12 input tokens, and 1 to 8 target tokens."""

    def __init__(self, num_rows: int | None = None) -> None:
        """Endless rows, or `num_rows` of them."""
        self.num_rows = num_rows

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        """See `RowSource`."""
        batch = {
            "input_ids": torch.zeros(len(row_numbers), INPUTS_LENGTH, dtype=torch.int64),
            "segment_ids": torch.zeros(len(row_numbers), INPUTS_LENGTH, dtype=torch.int64),
            "labels": torch.full((len(row_numbers), TARGETS_LENGTH), -100),
            "decoder_segment_ids": torch.zeros(len(row_numbers), TARGETS_LENGTH, dtype=torch.int64),
        }
        for place, number in enumerate(row_numbers):
            if number != EMPTY_ROW:
                draw = torch.Generator().manual_seed(number)
                length = int(torch.randint(1, TARGETS_LENGTH + 1, (), generator=draw))
                batch["input_ids"][place] = torch.randint(2, VOCAB_SIZE, (INPUTS_LENGTH,), generator=draw)
                batch["segment_ids"][place] = 1
                batch["labels"][place, :length] = torch.randint(2, VOCAB_SIZE, (length,), generator=draw)
                batch["decoder_segment_ids"][place, :length] = 1
        return batch


def tiny_trainer(
    run_dir: Path,
    *,
    model: Mapping[str, Any] | None = None,
    train_rows: Any = None,
    eval_rows: Any = None,
    objective: Objective | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of a fresh model.

    Args:
        run_dir: folder of the run, made where it is missing.
        model: fields put over those of the model.
        train_rows: rows to train on instead of random ones.
        eval_rows: rows to evaluate on instead of seven random ones.
        objective: instead of the plain loss.
        settings: fields put over those of the engine.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    config = SpadeT5Config.from_preset("tiny", vocab_size=VOCAB_SIZE, **{**SIZE, **(model or {})})
    values: dict[str, Any] = {
        "steps": 4,
        "global_batch_rows": 6,
        "micro_batch_rows": 2,
        "optimizer": AdamWConfig(learning_rate=1e-2),
        **settings,
    }
    return Trainer(
        model=build_model(SpadeT5ForConditionalGeneration, config, seed=0),
        objective=objective or Seq2SeqObjective(),
        train_rows=train_rows or RandomRows(),
        eval_rows=eval_rows or RandomRows(7),
        config=TrainingConfig(**values),
        run_dir=run_dir,
        facts={"config": {}},
    )


def train_metrics(run_dir: Path, key: str) -> list[Any]:
    """A metric of every training step."""
    return [metrics[key] for metrics in read_metrics(run_dir) if metrics["split"] == "train"]

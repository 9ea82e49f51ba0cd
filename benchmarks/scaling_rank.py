"""One rank of `spade-t5 bench scaling`: it carries out what it reads line by line as JSON, together with the others, and prints what came of it."""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.hf.loading import build_model
from spade_t5.training import distributed
from spade_t5.training.bandwidth import measure_collectives
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import Batch, NumberedRows
from spade_t5.training.deepspeed import start_processes
from spade_t5.training.engine import Trainer
from spade_t5.training.objectives import Seq2SeqObjective
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.reporting import read_metrics

WARMUP_STEPS = 2
"""Of two micro-batches each; ZeRO 3 records the order of modules in the first two."""
TIMED_STEPS = 3
MICRO_BATCHES = 2
INPUTS_LENGTH, TARGETS_LENGTH, VOCAB_SIZE = 32, 8, 512
SIZES_BYTES = (8, 64 << 10, 512 << 10, 2 << 20)
"""Of the collectives that a link is judged by; the largest is about the model's."""
TIMEOUT_SECONDS = 120


class SameRows(NumberedRows):
    """Rows of one token."""

    def collate(self, row_numbers: Any) -> Batch:
        """See `RowSource`."""
        ids = torch.full((len(row_numbers), INPUTS_LENGTH), 7)
        return {"input_ids": ids, "labels": ids[:, :TARGETS_LENGTH].clone()}


def small_model() -> SpadeT5ForConditionalGeneration:
    """`tiny` with one layer on either side and a small vocabulary: half a million weights, which a slow link carries in a second."""
    config = SpadeT5Config.from_preset(
        "tiny", vocab_size=VOCAB_SIZE, num_layers=1, num_decoder_layers=1, dropout_rate=0.0
    )
    return build_model(SpadeT5ForConditionalGeneration, config, seed=0)


def settings(zero_stage: int, world_size: int) -> TrainingConfig:
    """Settings of the run whose steps are timed."""
    return TrainingConfig(
        steps=WARMUP_STEPS + TIMED_STEPS,
        global_batch_rows=world_size * MICRO_BATCHES,
        micro_batch_rows=1,
        optimizer=AdamWConfig(learning_rate=1e-3),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage, persistence_threshold_numel=1000),  # type: ignore[arg-type]
    )


def step_seconds(zero_stage: int, run_dir: Path) -> float:
    """Median time of a step of the training engine."""
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model=small_model(),
        objective=Seq2SeqObjective(),
        train_rows=SameRows(),
        eval_rows=None,
        config=settings(zero_stage, distributed.world_size()),
        run_dir=run_dir,
        facts={},
    )
    trainer.fit()
    if not distributed.is_main():
        return 0.0
    seconds = [metrics["seconds"] for metrics in read_metrics(run_dir) if metrics["split"] == "train"]
    return statistics.median(seconds[-TIMED_STEPS:])


def collectives() -> list[list[Any]]:
    """Name, bytes and seconds of the collectives that training uses."""
    times = measure_collectives(
        ("all_reduce", "all_gather", "reduce_scatter"),
        device=torch.device("cpu"),
        sizes_bytes=SIZES_BYTES,
        seconds_each=0.5,
    )
    return [[one.name, one.num_bytes, one.seconds] for one in times]


def main() -> None:
    """Serves until its input ends."""
    distributed.die_with_parent()
    start_processes(TIMEOUT_SECONDS)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result: Any = (
            collectives() if request == "collectives" else step_seconds(request["zero_stage"], Path(request["run_dir"]))
        )
        distributed.barrier()
        print(json.dumps(result), flush=True)
    os._exit(0)  # gloo's threads would wait for ranks that have ended before


if __name__ == "__main__":
    main()

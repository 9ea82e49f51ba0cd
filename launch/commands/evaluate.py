"""Score a model: on a task, or, for a pretraining run without --task, on the held-out text of its store.

A fine-tuning run brings its task and settings with it. Other models need --task.

Example: spade-t5 evaluate runs/sst2/model --task sst2 task.source.name=folder task.source.path=glue
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from spade_t5.checkpoint import read_state
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import evaluate_config
from spade_t5.finetune.evaluate import evaluate_model
from spade_t5.finetune.registry import TASKS
from spade_t5.hf.loading import find_checkpoint
from spade_t5.launch.config_files import positive_int
from spade_t5.pretrain.evaluation import evaluate_held_out
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="run folder, checkpoint, exported folder, or name on the hub")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings under task., rows. and evaluation.; without --task under data., where it lies elsewhere now",
    )
    parser.add_argument(
        "--task",
        choices=sorted(TASKS),
        help="task to score; default: the one of a fine-tuning run, held-out loss of a pretraining run",
    )
    parser.add_argument("--out", type=Path, help="folder for predictions/ and scores.json, or for held_out.json")
    parser.add_argument("--max-rows", type=positive_int, help="held-out loss: rows scored (default: all)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    distributed.join()
    if arguments.task is None and _is_pretraining_run(Path(arguments.model)):
        for word in arguments.settings:
            if not word.startswith("data."):
                raise ConfigError(
                    f"argument {word!r}: settings need --task; without it only those under data. are taken"
                )
        result = asdict(
            evaluate_held_out(Path(arguments.model), data_words=arguments.settings, max_rows=arguments.max_rows)
        )
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "held_out.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        if arguments.max_rows is not None:
            raise ConfigError("--max-rows: belongs to the held-out loss; for a task set evaluation.max_examples")
        config = evaluate_config(arguments.model, arguments.task, arguments.settings)
        result = evaluate_model(
            arguments.model, config.task.build(), config=config.evaluation, rows=config.rows, out=arguments.out
        )
    if distributed.is_main():
        print(json.dumps(result, indent=1))


def _is_pretraining_run(path: Path) -> bool:
    checkpoint = find_checkpoint(path)
    return checkpoint is not None and "objective" in read_state(checkpoint)["config"]

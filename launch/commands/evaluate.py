"""Score a model: on a task, or, for a pretraining run without --task, on the held-out text of its store.

Example: spade-t5 evaluate runs/sst2 --task sst2 evaluation.split=validation task.folder=glue/SST-2
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from spade_t5.config import apply_overrides, from_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.evaluate import EvaluationConfig, evaluate_model
from spade_t5.finetune.registry import TASKS, task_config
from spade_t5.finetune.rows import RowsConfig
from spade_t5.launch.config_files import check_sections
from spade_t5.pretrain.evaluation import evaluate_held_out
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="run folder, checkpoint, exported folder, or name on the hub")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings under task., rows. and evaluation.")
    parser.add_argument("--task", choices=sorted(TASKS), help="task to score; without it: held-out loss of a pretraining run")
    parser.add_argument("--out", type=Path, help="folder for predictions/ and scores.json")
    parser.add_argument("--max-rows", type=int, help="without --task: held-out rows scored (default: all)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.task is None:
        if arguments.settings:
            raise ConfigError(f"argument {arguments.settings[0]!r}: settings need --task")
        result = asdict(evaluate_held_out(Path(arguments.model), max_rows=arguments.max_rows))
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "held_out.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        settings = apply_overrides({}, arguments.settings)
        check_sections(settings, ("task", "rows", "evaluation"))
        result = evaluate_model(
            arguments.model,
            task_config(arguments.task, settings.get("task", {})).build(),
            config=from_mapping(EvaluationConfig, settings.get("evaluation", {}), "evaluation"),
            rows=from_mapping(RowsConfig, settings.get("rows", {}), "rows"),
            out=arguments.out,
        )
    if distributed.is_main():
        print(json.dumps(result, indent=1))

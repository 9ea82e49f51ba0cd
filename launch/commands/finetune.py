"""Fine-tune a model on a task, score it and export it; start it under torchrun or `accelerate launch` for several processes."""

import argparse

from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.run import finetune
from spade_t5.launch.config_files import load_recipe
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file, or the name of a shipped recipe (configs/finetune)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings put over the file, such as model.init_from=runs/pretrain",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): go on from the newest checkpoint in run_dir; none: start anew; or a path",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_recipe(FinetuneConfig, arguments.config, arguments.overrides, kind="finetune")
    run_dir = finetune(config, resume=arguments.resume)
    if distributed.is_main():
        print(run_dir)

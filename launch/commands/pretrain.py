"""Pretrain a model on a token store; start it under torchrun or `accelerate launch` for several processes."""

import argparse

from spade_t5.launch.config_files import load_recipe
from spade_t5.pretrain.run import PretrainConfig, pretrain
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("config", help="YAML file, or the name of a shipped recipe (configs/pretrain)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings put over the file, such as training.steps=1000"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): go on from the newest checkpoint in run_dir; none: start anew; or a path",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_recipe(PretrainConfig, arguments.config, arguments.overrides, kind="pretrain")
    run_dir = pretrain(config, resume=arguments.resume)
    if distributed.is_main():
        print(run_dir)

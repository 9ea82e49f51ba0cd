"""Fine-tune a model on a task, score it and export it; start it under torchrun or `accelerate launch` for several processes."""

import argparse

from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.run import finetune
from spade_t5.launch.config_files import add_run_arguments, load_recipe, resume_of
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_run_arguments(parser, kind="finetune", example="model.init_from=runs/pretrain")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    config = load_recipe(FinetuneConfig, arguments.config, arguments.overrides, kind="finetune")
    run_dir = finetune(config, resume=resume_of(arguments))
    if distributed.is_main():
        print(run_dir)

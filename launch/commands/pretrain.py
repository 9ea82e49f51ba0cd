"""Pretrain a model on a token store; several processes are started by `spade-t5 launch`."""

import argparse
from pathlib import Path

from spade_t5.launch.config_files import add_run_arguments, foreign_settings, load_recipe, resume_of
from spade_t5.pretrain.run import PretrainConfig, pretrain
from spade_t5.training import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_run_arguments(parser, kind="pretrain", example="training.steps=1000")


def read_config(arguments: argparse.Namespace) -> PretrainConfig:
    """The run that the arguments describe."""
    return load_recipe(
        PretrainConfig,
        arguments.config,
        arguments.overrides,
        kind="pretrain",
        foreign=foreign_settings(arguments),
        cluster=arguments.cluster,
    )


def run_dir_of(arguments: argparse.Namespace) -> Path:
    """The folder of the run that the arguments describe."""
    return Path(read_config(arguments).run_dir)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    run_dir = pretrain(read_config(arguments), resume=resume_of(arguments))
    if distributed.is_main():
        print(run_dir)

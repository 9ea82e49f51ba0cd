"""Write the model of a run as a Hugging Face folder: safetensors, config, tokenizer and a model card."""

import argparse
from pathlib import Path

from spade_t5.hf.export import export_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint in one")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    print(export_run(arguments.run, arguments.out, step=arguments.step, max_shard_size=arguments.max_shard_size))

"""The whole story in minutes: tokenizer, store, pretraining on two processes, resume, fine-tuning, scores, export, generation."""

import argparse
import sys
from pathlib import Path

from spade_t5.launch.demo import DemoFailedError, run_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes (default: %(default)s)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the pretraining recipe, such as training.steps=100",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    try:
        run_demo(arguments.out, overrides=arguments.overrides)
    except DemoFailedError as error:
        sys.exit(f"spade-t5 demo: {error}")

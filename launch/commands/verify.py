"""Check every file of a checkpoint, token store or export against the manifest in its folder."""

import argparse
from pathlib import Path

from spade_t5.checkpoint import verify_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", type=Path, help="checkpoint, token store, or exported model")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    content = verify_folder(arguments.folder)
    print(f"{arguments.folder}: {len(content['files'])} files match the manifest")

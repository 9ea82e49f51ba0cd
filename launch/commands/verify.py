"""Check every file of a checkpoint, token store or export against the manifest in its folder; of a run folder, every checkpoint."""

import argparse
from pathlib import Path

from spade_t5.checkpoint import checkpoint_folders, verify_checkpoint, verify_folder
from spade_t5.checkpoint.manifest import read_manifest
from spade_t5.errors import DataError
from spade_t5.pretrain.store import TokenStore, is_token_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", type=Path, help="run folder, checkpoint, token store, or exported model")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    folder = arguments.folder
    if (folder / "checkpoints").is_dir():
        _verify_run(folder)
    elif is_token_store(folder):
        TokenStore.open(folder).verify()
        _say_good(folder)
    elif read_manifest(folder).get("kind") == "checkpoint":
        verify_checkpoint(folder)
        _say_good(folder)
    else:
        verify_folder(folder)
        _say_good(folder)


def _verify_run(run: Path) -> None:
    """Says of every checkpoint whether it is good.

    Raises:
        DataError: some are not, or there is none.
    """
    checkpoints = checkpoint_folders(run / "checkpoints")
    if not checkpoints:
        raise DataError(f"{run}: holds no checkpoint")
    num_bad = 0
    for checkpoint in checkpoints:
        try:
            verify_checkpoint(checkpoint)
            _say_good(checkpoint)
        except DataError as error:
            num_bad += 1
            print(error)
    if num_bad:
        raise DataError(
            f"{run}: {num_bad} of {len(checkpoints)} checkpoints are damaged; a resumed run steps back over them"
        )


def _say_good(folder: Path) -> None:
    print(f"{folder}: every file matches the manifest")

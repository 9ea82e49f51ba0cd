"""Convert a model between Hugging Face's T5 1.1 or LongT5 (local attention) and SPADE-T5, in whichever direction it goes."""

import argparse
import shutil
from pathlib import Path

from spade_t5.checkpoint import publish, write_manifest
from spade_t5.checkpoint.manifest import file_entry
from spade_t5.errors import ConfigError
from spade_t5.hf.conversion import convert_checkpoint
from spade_t5.hf.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", help="folder or hub name of a T5, LongT5 or SPADE-T5 model with its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    out: Path = arguments.out
    if out.exists():
        raise ConfigError(f"--out: {out} already exists; choose another folder or remove it")
    temporary = out.parent / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        convert_checkpoint(arguments.source, temporary)
        load_tokenizer(arguments.source).save_pretrained(temporary)
        write_manifest(temporary, {path.name: file_entry(path) for path in temporary.iterdir()}, kind="export")
        publish(temporary, out)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror}); free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(out)

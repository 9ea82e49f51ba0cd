"""Train a SentencePiece tokenizer with sentinels on a corpus.

Example: spade-t5 tokenizer corpus.name=pydocs vocab_size=8000 out=runs/tokenizer
"""

import argparse

from spade_t5.launch.config_files import add_settings, load_settings
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_settings(parser, TokenizerConfig)
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad row instead of skipping and counting it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    print(train_tokenizer(load_settings(TokenizerConfig, arguments.settings, strict=arguments.strict)))

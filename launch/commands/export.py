"""Write the model of a run as a Hugging Face folder: safetensors, config, tokenizer and a model card. The run may be going on."""

import argparse
from pathlib import Path

from spade_t5.checkpoint.request import checkpoint_now
from spade_t5.errors import ConfigError
from spade_t5.hf.export import export_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint in one")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    parser.add_argument(
        "--now", action="store_true", help="ask the run that is going on for a checkpoint, and take that"
    )
    parser.add_argument(
        "--wait-seconds", type=float, default=1800.0, help="with --now: how long to wait for it (default: %(default)s)"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving averages of the weights")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weights file (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    source, step = arguments.run, arguments.step
    if arguments.now:
        if step is not None:
            raise ConfigError("--now: cannot be given with --step; leave one of them out")
        source = checkpoint_now(source, timeout_seconds=arguments.wait_seconds)
    print(
        export_run(source, arguments.out, step=step, is_averaged=arguments.ema, max_shard_size=arguments.max_shard_size)
    )

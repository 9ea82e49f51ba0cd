"""Start a run on several processes: one process a device, started again from the last checkpoint when one of them dies."""

import argparse
import importlib
from pathlib import Path

from spade_t5.errors import ConfigError
from spade_t5.launch.cli import EXIT_USER_ERROR, OneLineErrorParser
from spade_t5.launch.local import local_launch
from spade_t5.launch.supervisor import describe, supervise
from spade_t5.training.shared_folder import make_folder, remove_empty

HANDS_ON_WORDS = True
COMMANDS = ("pretrain", "finetune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.usage = "spade-t5 launch local --nproc-per-node N [options] -- pretrain CONFIG [key=value ...]"
    parser.add_argument("where", choices=["local"], help="local: all processes on this machine")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="N", help="processes on a machine")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="K",
        help="starts after a fault without a new checkpoint in between; default 3",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long the processes have to save and end when this command is asked to stop; default 120",
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="folder of the processes' output; default logs/ in the run folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument("words", nargs="+", metavar="COMMAND", help=f"{' or '.join(COMMANDS)} and its arguments")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns the exit code of the run."""
    _check(arguments)
    run_dir = _run_dir(arguments.words)
    logs = arguments.log_dir or run_dir / "logs"
    launch = local_launch(
        arguments.words,
        num_ranks=arguments.nproc_per_node,
        run_dir=run_dir,
        logs=logs,
        max_restarts=arguments.max_restarts,
        grace_seconds=arguments.grace,
    )
    if arguments.dry_run:
        print(describe(launch))
        return 0
    made = make_folder(run_dir)
    code = EXIT_USER_ERROR
    try:
        code = supervise(launch)
    finally:
        if code == EXIT_USER_ERROR:  # a refused run leaves nothing behind
            remove_empty([logs])
            remove_empty(made)
    return code


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("nproc_per_node", 1), ("max_restarts", 0), ("grace", 1)):
        if not getattr(arguments, name) >= least:  # nan is neither
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(arguments, name):g} must be at least {least}")
    if arguments.words[0] not in COMMANDS:
        raise ConfigError(f"{arguments.words[0]}: only {' and '.join(COMMANDS)} run on several processes")


def _run_dir(words: list[str]) -> Path:
    """The run folder of a command; whatever is wrong with its arguments and its config is said here, before anything starts."""
    name, *rest = words
    module = importlib.import_module(f"spade_t5.launch.commands.{name}")
    parser = OneLineErrorParser(prog=f"spade-t5 {name}", description=module.__doc__)
    module.add_arguments(parser)
    return Path(module.read_config(parser.parse_intermixed_args(rest)).run_dir)

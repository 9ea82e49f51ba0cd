"""What the forms of `spade-t5 launch` have in common on the command line."""

import argparse
import importlib
import tempfile
from pathlib import Path

from spade_t5.errors import ConfigError
from spade_t5.launch.cli import OneLineErrorParser
from spade_t5.launch.environment import FORWARDED
from spade_t5.launch.supervisor import Supervision

RUNS = ("pretrain", "finetune")
"""Commands that train in a run folder."""
COMMANDS = (*RUNS, "doctor")
"""Commands that run on several processes."""


LEAST_LOST_AFTER = 5
"""Of `--lost-after`, in seconds: some signs of life."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """The command that is launched; to be added last."""
    parser.usage = f"{parser.prog} [options] -- pretrain CONFIG [key=value ...]"
    parser.add_argument("words", nargs="+", metavar="COMMAND", help=f"{', '.join(COMMANDS)}, and its arguments")


def add_supervision(parser: argparse.ArgumentParser) -> None:
    """How the ranks are watched over."""
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="K",
        help="starts after a fault without a new checkpoint in between; default 3",
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="folder of the processes' output; default logs/ in the run folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")


def add_grace(parser: argparse.ArgumentParser) -> None:
    """How long ranks have to stop."""
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long the processes have to save and end when this command is asked to stop; default 120",
    )


def check_least(arguments: argparse.Namespace, **least: float) -> None:
    """Refuses numbers that are too small.

    Args:
        arguments: what was given.
        least: the least value of options that may not be null, by name.

    Raises:
        ConfigError: naming option and value.
    """
    for name, bound in least.items():
        value = getattr(arguments, name)
        if not value >= bound:  # nan is neither
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} must be at least {bound:g}")


def supervision_of(arguments: argparse.Namespace) -> Supervision:
    """What the arguments say of the run and of how it is watched over; whatever is wrong with the run's config is said here, before anything starts.

    Raises:
        ConfigError: an option, the command or its config is wrong.
    """
    check_least(arguments, max_restarts=0)
    name, *rest = arguments.words
    if name not in COMMANDS:
        raise ConfigError(f"{name}: only {', '.join(COMMANDS)} run on several processes")
    module = importlib.import_module(f"spade_t5.launch.commands.{name}")
    parser = OneLineErrorParser(prog=f"spade-t5 {name}", description=module.__doc__)
    module.add_arguments(parser)
    run_dir = module.run_dir_of(parser.parse_intermixed_args(rest))
    if run_dir is None:
        logs = arguments.log_dir or Path(tempfile.gettempdir())
        return Supervision(run_dir=None, logs=logs, max_restarts=0, keeps_logs=arguments.log_dir is not None)
    return Supervision(run_dir=run_dir, logs=arguments.log_dir or run_dir / "logs", max_restarts=arguments.max_restarts)


def add_patience(parser: argparse.ArgumentParser) -> None:
    """How long machines and coordinator wait for each other."""
    parser.add_argument(
        "--lost-after",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="a node, or for it the coordinator, that is silent for so long is lost; default 30",
    )
    parser.add_argument(
        "--wait-for-nodes",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a start waits for nodes that are not there; default 600",
    )


def add_gathering(parser: argparse.ArgumentParser) -> None:
    """Which machines take part, and what their ranks are given."""
    parser.add_argument(
        "--nnodes",
        type=node_range,
        metavar="MIN:MAX",
        help="nodes of the run: the first MAX of the list, and so few that it goes on when others are lost; one number is both; default all",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help=f"variable for all processes; repeatable; those that begin with {', '.join(FORWARDED)} go by themselves, but for secrets",
    )
    parser.add_argument(
        "--address", help="address of this machine that all others reach; default that on the way to the first"
    )
    add_patience(parser)


def node_range(text: str) -> tuple[int, int]:
    """Least and largest number of nodes, as a type of command-line options.

    >>> node_range("2:4"), node_range("3")
    ((2, 4), (3, 3))
    """
    least, _, most = text.partition(":")
    try:
        bounds = int(least), int(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not MIN:MAX or one number") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text}: MIN must be at least 1 and at most MAX")
    return bounds

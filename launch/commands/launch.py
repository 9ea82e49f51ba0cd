"""Start a run on several processes, on this machine or on many: one process a device, started again from the last checkpoint when one of them dies."""

import argparse
import importlib

from spade_t5.launch.cli import OneLineErrorParser

HANDS_ON_WORDS = True
FORMS = {
    "local": "all processes on this machine",
    "hostfile": "on the machines of a list, by a remote shell such as ssh",
    "slurm": "on the nodes of a SLURM job; outside of one, submit it",
    "k8s": "write the manifests of a run on Kubernetes",
    "node": "one machine of a launch; the other forms start it",
    "pod": "one pod of a launch on Kubernetes; the manifests start it",
}
"""Where processes are started, and what is said of it; each is a module of `spade_t5.launch` with `add_arguments` and `run`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    forms = parser.add_subparsers(dest="form", required=True, metavar="WHERE", parser_class=OneLineErrorParser)
    for name, summary in FORMS.items():
        module = importlib.import_module(f"spade_t5.launch.{name}")
        module.add_arguments(forms.add_parser(name, help=summary, description=module.__doc__))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns the exit code of the run."""
    return importlib.import_module(f"spade_t5.launch.{arguments.form}").run(arguments)

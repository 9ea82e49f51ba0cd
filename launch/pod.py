"""One pod of a launch on Kubernetes; `spade-t5 launch k8s` writes the manifest that starts all.

The first pod listens for the others and runs a node of its own. The cluster starts pods anew that it has lost, in any order and at any time: a
node looks for the first pod until it is there, and a first pod that was replaced waits for the nodes.
"""

import argparse
import os

from spade_t5.errors import ConfigError
from spade_t5.launch import node, options
from spade_t5.launch.coordinator import Gathering, Machine
from spade_t5.launch.many import node_words, run_many
from spade_t5.launch.node import SECRET_VARIABLE
from spade_t5.launch.remote_shell import same_place_words
from spade_t5.training.stopping import EXIT_STOPPED

FOREIGN_PREFIX = "PET_"
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which an operator would have torchrun find the other pods; ours is told otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument(
        "--pods", required=True, metavar="NAME,...", help="names of all pods, in the order of their ranks"
    )
    parser.add_argument(
        "--index-from", required=True, metavar="VARIABLE", help="variable that says which of them this is"
    )
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="where the first pod listens")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="N", help="processes in each pod")
    parser.add_argument(
        "--stopped-code",
        type=int,
        default=EXIT_STOPPED,
        metavar="CODE",
        help=f"exit code in place of {EXIT_STOPPED}, for operators that start a pod again at certain codes alone; default {EXIT_STOPPED}",
    )
    parser.add_argument("--address", required=True, help="address of this pod")
    parser.add_argument(
        "--nnodes", type=options.node_range, metavar="MIN:MAX", help="how few pods the run goes on with; default all"
    )
    options.add_patience(parser)
    options.add_supervision(parser)
    options.add_grace(parser)
    options.add_command(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the ranks of this pod, and those of all if it is the first, and returns the exit code of the launch."""
    options.check_least(arguments, nproc_per_node=1, grace=1, lost_after=options.LEAST_LOST_AFTER, wait_for_nodes=1)
    pods, index = arguments.pods.split(","), os.environ.get(arguments.index_from, "")
    if not (index.isdigit() and int(index) < len(pods)):
        raise ConfigError(
            f"--index-from: {arguments.index_from} is {index!r}, expected 0 to {len(pods) - 1}; the cluster sets it"
        )
    for name in [name for name in os.environ if name in FOREIGN_VARIABLES or name.startswith(FOREIGN_PREFIX)]:
        del os.environ[name]
    code = _run(arguments, pods, int(index))
    return arguments.stopped_code if code == EXIT_STOPPED else code


def _run(arguments: argparse.Namespace, pods: list[str], index: int) -> int:
    host, _, port = arguments.coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise ConfigError(f"--coordinator: {arguments.coordinator!r} is not HOST:PORT")
    if index > 0:
        arguments.name, arguments.secret_from = pods[index], "environment"
        return node.run(arguments)
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        raise ConfigError(f"{SECRET_VARIABLE}: not set; give the pods the launch's secret, as docs/multinode.md shows")
    own = same_place_words(node_words(pods[0], arguments.nproc_per_node, arguments))
    gathering = Gathering(
        machines=[
            Machine(name=pod, num_ranks=arguments.nproc_per_node, start=own if number == 0 else None)
            for number, pod in enumerate(pods)
        ],
        min_machines=len(pods) if arguments.nnodes is None else arguments.nnodes[0],
        address=arguments.address,
        port=int(port),
        secret=secret,
        grace_seconds=arguments.grace,
        lost_after_seconds=arguments.lost_after,
        wait_seconds=arguments.wait_for_nodes,
    )
    return run_many(gathering, options.supervision_of(arguments))

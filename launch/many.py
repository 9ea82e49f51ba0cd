"""A launch on many machines, whatever list and remote shell they come from."""

import argparse
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spade_t5.errors import ConfigError
from spade_t5.launch import options
from spade_t5.launch.coordinator import Coordinator, Gathering, Machine
from spade_t5.launch.environment import CACHES, forwarded
from spade_t5.launch.group import LOOPBACK, Place, Ranks, Start, describe
from spade_t5.launch.rank import NODE_VARIABLE
from spade_t5.launch.remote_shell import HOST, address_towards, is_here, remote_words, same_place_words
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.supervisor import Supervision, supervise
from spade_t5.messages import is_secret_name


def add_arguments_of_many(parser: argparse.ArgumentParser) -> None:
    """Arguments of every form that starts several machines."""
    options.add_gathering(parser)
    options.add_supervision(parser)
    options.add_grace(parser)
    options.add_command(parser)


OnEnd = Callable[[int, signal.Signals | None], None]
"""Called at the end of a launch with its exit code and what it was asked to do, if it was; a further request does not break it off."""


def launch_on(
    hosts: Sequence[tuple[str, int]], arguments: argparse.Namespace, remote_shell: str, on_end: OnEnd | None = None
) -> int:
    """Runs the command on hosts, and returns the exit code of the run.

    Args:
        hosts: names and numbers of ranks.
        arguments: those of `add_arguments_of_many`.
        remote_shell: reaches hosts other than this one.
        on_end: what is to be done then.

    Raises:
        ConfigError: an option, the command or its config is wrong, or hosts cannot be reached.
    """
    options.check_least(arguments, grace=1, lost_after=options.LEAST_LOST_AFTER, wait_for_nodes=1)
    supervision = options.supervision_of(arguments)
    least, most = arguments.nnodes or (len(hosts), len(hosts))
    if most > len(hosts):
        raise ConfigError(
            f"--nnodes: {most} nodes are wanted, but there are {len(hosts)} hosts; add hosts or ask for fewer"
        )
    machines = [
        Machine(name=host, num_ranks=num_ranks, start=_start_words(host, num_ranks, arguments, remote_shell))
        for host, num_ranks in hosts[:most]
    ]
    gathering = Gathering(
        machines=machines,
        min_machines=least,
        address=arguments.address or _own_address([machine.name for machine in machines]),
        environment=forwarded(arguments.env, os.environ),
        grace_seconds=arguments.grace,
        lost_after_seconds=arguments.lost_after,
        wait_seconds=arguments.wait_for_nodes,
    )
    if arguments.dry_run:
        print(_describe(gathering, supervision, arguments.words))
        return 0
    return run_many(gathering, supervision, on_end)


def run_many(gathering: Gathering, supervision: Supervision, on_end: OnEnd | None = None) -> int:
    """Runs the ranks of many machines to their end, and returns the exit code of the run."""
    with LauncherStop() as stop:
        with Coordinator(gathering, stop) as coordinator:
            code = coordinator.finish(supervise(supervision, coordinator.run, stop))
        if on_end is not None:
            on_end(code, stop.signal)
    return code


def node_words(name: str, num_ranks: int, arguments: argparse.Namespace) -> list[str]:
    """The words of the `spade-t5` command that is one machine of a launch."""
    return [
        *("launch", "node", "--coordinator", "{coordinator}", "--name", name, "--nproc-per-node", str(num_ranks)),
        *("--grace", f"{arguments.grace:g}", "--lost-after", f"{arguments.lost_after:g}"),
        *("--wait-for-nodes", f"{arguments.wait_for_nodes:g}", "--", *arguments.words),
    ]


def _start_words(host: str, num_ranks: int, arguments: argparse.Namespace, remote_shell: str) -> list[str]:
    words = same_place_words(node_words(host, num_ranks, arguments))
    is_direct = HOST not in remote_shell and is_here(host)  # a scheduler's command is used for this machine too
    return words if is_direct else remote_words(remote_shell, host, words)


def _own_address(hosts: Sequence[str]) -> str:
    """This machine's address on the way to the first host that is another one."""
    for host in hosts:
        if not is_here(host):
            try:
                return address_towards(host.rpartition("@")[2])
            except OSError as error:
                raise ConfigError(
                    f"--address: no way to {host} ({error.strerror}); mend the host's name, or give the address of this machine"
                ) from None
    return LOOPBACK


def _describe(gathering: Gathering, supervision: Supervision, words: Sequence[str]) -> str:
    """The commands that start the machines, and what each then starts."""
    first_rank, world_size = 0, sum(machine.num_ranks for machine in gathering.machines)
    parts = []
    for number, machine in enumerate(gathering.machines):
        place = Place(number, len(gathering.machines), first_rank, world_size, "ADDRESS-OF-FIRST", 0)
        environment = {name: "***" if is_secret_name(name) else v for name, v in gathering.environment.items()}
        ranks = Ranks(
            command=words,
            num_ranks=machine.num_ranks,
            environment=environment,
            grace_seconds=gathering.grace_seconds,
        )
        start = Start(Path(supervision.logs), 0, time.monotonic(), place)
        address = f"{gathering.address}:PORT"
        command = shlex.join(word.replace("{coordinator}", address) for word in machine.start or ())
        parts.append(
            f"# {machine.name}: ranks {first_rank} to {first_rank + machine.num_ranks - 1}\n{command}\n# starts there\n{describe(ranks, start)}"
        )
        first_rank += machine.num_ranks
    added = f"{NODE_VARIABLE}, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME by its network, OMP_NUM_THREADS by its cores"
    parts.append(f"# each node adds, unless set: {added}; {', '.join(CACHES)} in its temporary folder")
    return "\n\n".join(parts)

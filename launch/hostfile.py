"""On the machines of a list, each reached by a remote shell such as ssh.

The list is a hostfile as DeepSpeed and Open MPI read it, `HOST slots=N` a line. All machines have the same Python, run folder and data under the
same paths.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from spade_t5.errors import ConfigError
from spade_t5.launch import options
from spade_t5.launch.accelerate_config import add_shape_option, take_over_shape
from spade_t5.launch.many import add_arguments_of_many, launch_on
from spade_t5.launch.remote_shell import DEFAULT_SHELL
from spade_t5.messages import shown

_HOST = re.compile(r"[A-Za-z0-9_.@:][A-Za-z0-9_.@:-]*")  # no leading dash: it would be an option of the remote shell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="the machines: HOST slots=N a line")
    add_shape_option(parser)
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="processes on each machine, instead of the hostfile's slots"
    )
    parser.add_argument(
        "--remote-shell",
        default=DEFAULT_SHELL,
        metavar="COMMAND",
        help="command that is given a host and a command line to run there; if it has {host} in it, the words of the command are put behind it instead; default %(default)s",
    )
    add_arguments_of_many(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command on the machines, and returns the exit code of the run."""
    take_over_shape(arguments)
    if arguments.nproc_per_node is not None:
        options.check_least(arguments, nproc_per_node=1)
    return launch_on(read_hostfile(arguments.hostfile, arguments.nproc_per_node), arguments, arguments.remote_shell)


def read_hostfile(path: Path, num_ranks: int | None) -> list[tuple[str, int]]:
    """Hosts and how many ranks each has.

    Args:
        path: the file.
        num_ranks: of every host; None: its slots.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--hostfile: {path} cannot be read ({getattr(error, 'strerror', None) or 'no text'})"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host, *rest = words
        slots = _slots(rest)
        if not _HOST.fullmatch(host) or slots == 0:
            raise ConfigError(f"--hostfile: line {number} of {path} is {shown(line)}; write HOST slots=N, N at least 1")
        if host in hosts:
            raise ConfigError(f"--hostfile: line {number} of {path} has {host} again; write each host once")
        if num_ranks is None and slots is None:
            raise ConfigError(f"--hostfile: line {number} of {path} has no slots=N; add it, or give --nproc-per-node")
        hosts[host] = num_ranks or slots or 1
    if not hosts:
        raise ConfigError(f"--hostfile: {path} names no host; write HOST slots=N a line")
    return list(hosts.items())


def _slots(words: Sequence[str]) -> int | None:
    """Of `slots=N`; None without it, 0 for anything else."""
    if not words:
        return None
    found = re.fullmatch(r"slots=(\d{1,6})", words[0])
    return int(found[1]) if found and len(words) == 1 else 0

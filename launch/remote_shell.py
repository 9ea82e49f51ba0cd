"""Commands that start a process on another machine."""

import os
import shlex
import socket
import sys
from collections.abc import Sequence

DEFAULT_SHELL = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
HOST = "{host}"
CARRIED = ("PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables without which Python may not find there what it found here; they are part of the command, all others travel by its standard input."""


def remote_words(shell: str, host: str, words: Sequence[str]) -> list[str]:
    """The command that runs `words` on `host`.

    A shell in which `{host}` stands takes the words as they are, as `srun`, `kubectl exec` and `ip netns exec` do; any other is given the host
    and one quoted line, as `ssh` is.

    >>> remote_words("srun --nodelist={host}", "n1", ["echo", "a b"])
    ['srun', '--nodelist=n1', 'echo', 'a b']
    >>> remote_words("ssh -q", "n1", ["echo", "a b"])
    ['ssh', '-q', 'n1', "echo 'a b'"]
    """
    template = shlex.split(shell)
    if any(HOST in word for word in template):
        return [*(word.replace(HOST, host) for word in template), *words]
    return [*template, host, shlex.join(words)]


def same_place_words(words: Sequence[str]) -> list[str]:
    """The words of a `spade-t5` command, to be run by this Python and in this folder wherever they get to."""
    variables = [f"{name}={os.environ[name]}" for name in CARRIED if os.environ.get(name)]
    python = ["env", *variables, sys.executable] if variables else [sys.executable]
    return ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *python, "-m", "spade_t5.launch", *words]


def is_here(host: str) -> bool:
    """Whether a host name is one of this machine's."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def address_towards(host: str) -> str:
    """This machine's address on the way to a host.

    Raises:
        OSError: the host's name is not known, or there is no way to it.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # nothing is sent
        probe.connect(address)
        return str(probe.getsockname()[0])

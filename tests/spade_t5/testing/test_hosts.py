"""Hosts of a cluster on this machine: they are strangers to each other, their links can be cut and slowed, and nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spade_t5.testing.hosts import INTERFACE, HostProcess, Hosts, hosts_or_skip, make_hosts

SERVER = """
import socket, time
listener = socket.create_server(("", 7000))
print("ready", flush=True)
connection, _ = listener.accept()
connection.sendall(b"!")
began, received = time.monotonic(), 0
while block := connection.recv(1 << 20):
    received += len(block)
print(received, time.monotonic() - began, flush=True)
"""
CLIENT = """
import socket, sys, time
began = time.monotonic()
connection = socket.create_connection(("host2", 7000))
connection.recv(1)
print(time.monotonic() - began, flush=True)
for line in sys.stdin:
    connection.sendall(bytes(int(line)))
    print("sent", flush=True)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_or_skip(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def transfer(hosts: Hosts, num_bytes: int) -> tuple[float, float]:
    """Seconds until the first answer of host2 to host1, and bytes a second from there to here, as host2 measures."""
    with serving(hosts) as (server, client):
        connected = float(client.stdout.readline())
        client.stdin.write(f"{num_bytes}\n")
        client.stdin.close()
        received, seconds = server.stdout.readline().split()
        assert int(received) == num_bytes
        return connected, num_bytes / float(seconds)


@contextmanager
def serving(hosts: Hosts) -> Iterator[tuple[HostProcess, HostProcess]]:
    """A server on host2 with a client on host1."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = hosts[1].popen([sys.executable, "-c", SERVER], **pipes)
    assert server.stdout.readline() == "ready\n"
    yield server, hosts[0].popen([sys.executable, "-c", CLIENT], **pipes)
    for host in hosts:
        host.assert_idle()


def test_each_logs_in_to_the_other_and_finds_a_machine_of_its_own(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_HOST_1", "x")
    for here, there in (hosts, tuple(hosts)[::-1]):
        done = here.run(
            ["ssh", there.name, "hostname; ls /sys/class/net; ls /proc; env; ls -A /dev/shm $TMPDIR; exit 75"]
        )
        assert done.returncode == 75
        assert done.stdout.startswith(f"{there.name}\n{INTERFACE}\nlo\n1\n")
        assert str(os.getpid()) not in done.stdout.splitlines()
        assert "SECRET_OF_HOST_1" not in done.stdout
        assert f"SSH_CONNECTION={here.address} " in done.stdout
        there.assert_idle()


def test_everything_on_a_host_is_killed_but_nothing_else(hosts: Hosts) -> None:
    here, there = hosts
    others = here.popen(["sleep", "600"])
    processes = [there.popen(["sh", "-c", "sleep 600 & sleep 600"]) for _ in range(2)]
    by_ssh = here.popen(["ssh", "host2", "sleep 600"], stderr=subprocess.DEVNULL)
    while len(there.processes()) < 2 * 3 + 2:
        time.sleep(0.01)
    there.kill_all()
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL] * 2
    assert by_ssh.wait(5) == 255
    there.assert_idle(0)
    assert others.poll() is None
    others.kill(signal.SIGTERM)
    assert others.wait(5) == -signal.SIGTERM
    assert "refused" in here.run(["ssh", "host2", "true"]).stderr
    there.start_sshd()
    assert here.run(["ssh", "host2", "true"]).returncode == 0


def test_a_cut_is_silent_and_can_be_mended(hosts: Hosts) -> None:
    with serving(hosts) as (server, client):
        client.stdout.readline()
        with hosts.cut(hosts[1]):
            client.stdin.write("100\n")
            client.stdin.flush()
            assert client.stdout.readline() == "sent\n", "the sender does not notice"
            for host in hosts:
                assert "LOWER_UP" in host.run(["ip", "link", "show", INTERFACE]).stdout
            assert "timed out" in hosts[0].run(["ssh", "-o", "ConnectTimeout=1", "host2", "true"]).stderr
            assert server.poll() is client.poll() is None
        client.stdin.close()
        assert server.stdout.readline().split()[0] == "100", "what was on its way arrives"


def test_a_link_is_as_slow_as_it_was_made(hosts: Hosts) -> None:
    _, fast = transfer(hosts, 2**23)
    with hosts.slowed(bytes_per_second=4e6):
        _, slow = transfer(hosts, 2**21)
    assert 0.5 < slow / 4e6 < 1.05
    assert fast > 2 * slow
    with hosts.slowed(bytes_per_second=4e6, delay_seconds=0.05):
        connected, slow = transfer(hosts, 2**21)
    assert connected > 3 * 0.05, "there, back, and there again"
    assert 0.3 < slow / 4e6 < 1.05
    connected, fast = transfer(hosts, 2**23)
    assert connected < 0.05
    assert fast > 2 * slow


def test_a_host_that_is_removed_answers_nothing(tmp_path: Path, hosts: Hosts) -> None:
    with make_hosts(tmp_path, 3) as own:
        left = own[1].popen(["sleep", "600"])
        own.remove(own[1])
        assert left.wait(5) != 0
        own[1].assert_idle()
        assert "refused" not in own[0].run(["ssh", "-o", "ConnectTimeout=1", "host2", "true"]).stderr
        with own.slowed(bytes_per_second=1e6, delay_seconds=0.001):
            assert own[0].run(["ssh", "host3", "hostname"]).stdout == "host3\n"
    assert hosts[0].run(["ssh", "host2", "true"]).returncode == 0, "others under the same addresses are untouched"


MAKER = """
import sys, time
from pathlib import Path
from spade_t5.testing.hosts import make_hosts
with make_hosts(Path(sys.argv[1])) as hosts:
    print(*hosts.namespaces(), flush=True)
    hosts[1].popen(["sleep", "600"]).pid
    with hosts.slowed(delay_seconds=0.1):
        print("made", flush=True)
        time.sleep(600)
"""


def test_nothing_is_left_when_the_maker_is_killed(tmp_path: Path, hosts: Hosts) -> None:
    maker = subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    namespaces = maker.stdout.readline().split()
    maker.stdout.readline()
    assert in_namespaces(namespaces)
    maker.kill()
    maker.wait()
    deadline = time.monotonic() + 10
    while left := in_namespaces(namespaces):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def in_namespaces(names: list[str]) -> list[str]:
    """Processes that are in one of the network namespaces."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{entry}/ns/net") in names:
                found.append(Path(f"/proc/{entry}/cmdline").read_text())
        except OSError:
            continue
    return found

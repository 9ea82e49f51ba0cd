"""Hosts of a cluster on this machine, for tests that cut links and kill machines: processes of one are strangers to those of another.

    with make_hosts(tmp_path) as hosts:
        hosts[0].run(["ssh", "host2", "hostname"])
        with hosts.cut(hosts[1]):
            ...

A host has a network, process ids, shared memory and temporary files of its own, its own name, and a real sshd that every host may log in to as
on a cluster; the other files are those of this machine, as on a cluster with a shared disk. Between the hosts stands a bridge, in a namespace
of its own: what is cut or made slow there goes unnoticed by the hosts' interfaces. All namespaces are held by processes that end with the
one that made them, so nothing is left of them, however it ends. Nothing outside can be reached from a host.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NETWORK = "10.41.7"
"""The first three numbers of every address."""
INTERFACE = "eth0"
BRIDGE = "bridge"
TOOLS = ("bridge", "ip", "nsenter", "setsid", "ssh", "ssh-keygen", "sshd", "tc", "unshare")
BURST_BYTES = 2**16
"""What a link of limited rate lets through at once: less than a packet before it is segmented, and more than one after."""
QUEUE_SECONDS = 0.1
"""What may wait at the entry of a link of limited rate."""

FIRST_PROCESS = """
import os, signal, sys, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are taken away as they end
print("ready", flush=True)
for line in sys.stdin:
    try:
        while True:
            os.kill(-1, signal.SIGKILL)
            time.sleep(0.01)
    except ProcessLookupError:
        print("killed", flush=True)
"""
"""Process 1 of a host: it kills all others at every line of its input, and ends with it, and so do they."""

DELAY_LINE = """
import collections, fcntl, os, select, struct, sys, time
delay, waiting, partner = float(sys.argv[1]), collections.deque(), {}
def tap(name):
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF; IFF_TAP and IFF_NO_PI
    return file
for port in sys.argv[2:]:
    near, far = tap("near-" + port), tap("far-" + port)
    partner[near], partner[far] = (far, 0), (near, delay)
print("ready", flush=True)
while True:
    rest = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
    for file in select.select([0, *partner], [], [], rest)[0]:
        if file == 0:  # the end of the input
            sys.exit()
        to, seconds = partner[file]
        try:
            for _ in range(64):
                frame = os.read(file, 65536)
                if seconds:
                    waiting.append((time.monotonic() + seconds, to, frame))
                else:
                    os.write(to, frame)
        except OSError:  # nothing more to read, or no room to write: the frame is lost, as it may be
            pass
    while waiting and waiting[0][0] <= time.monotonic():
        _, to, frame = waiting.popleft()
        try:
            os.write(to, frame)
        except OSError:
            pass
"""
"""Keeps what is on its way to a host for a while. tc's netem would do it, but not every kernel has that."""

SET_UP_HOST = """
set -e
hostname "$1"
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mkdir -m 1777 /run/tmp
mount --bind "$2" /etc/hosts
mount --bind "$3" /etc/ssh/ssh_config
ip link set lo up
exec "$4" -c "$5"
"""

SSH_CONFIG = """\
Host *
    BatchMode yes
    ConnectTimeout 5
    GlobalKnownHostsFile /dev/null
    IdentitiesOnly yes
    IdentityFile {folder}/key
    LogLevel ERROR
    ServerAliveInterval 5
    UserKnownHostsFile {folder}/known_hosts
"""

SSHD_CONFIG = """\
AuthorizedKeysFile {folder}/key.pub
HostKey {folder}/host_key
ListenAddress {address}
PasswordAuthentication no
PermitRootLogin yes
PidFile none
SetEnv {variables}
StrictModes no
UsePAM no
"""


@functools.cache
def why_no_hosts() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if os.getuid() != 0:
        return "network namespaces with an sshd need root"  # who must be able to become another user
    missing = [tool for tool in TOOLS if _find(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian packages iproute2, openssh-client, openssh-server)"
    try:
        with tempfile.TemporaryDirectory() as folder, make_hosts(Path(folder)):
            return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"network namespaces are not permitted here: {error}"


@contextmanager
def hosts_or_skip(folder: Path, count: int = 2) -> Iterator["Hosts"]:
    """`make_hosts` for a test, which is skipped where hosts cannot be made."""
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    with make_hosts(folder, count) as hosts:
        yield hosts


class HostProcess:
    """A process on a host; what it starts there is not waited for."""

    def __init__(self, door: subprocess.Popen[Any]) -> None:
        """Takes hold of the `nsenter` that has it for its child."""
        self._door = door
        self.stdin, self.stdout, self.stderr = door.stdin, door.stdout, door.stderr

    @property
    def pid(self) -> int:
        """Process id as seen from outside of the host; it is also the process's session and process group."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            children = [pid for pid, facts in _processes() if facts.parent == self._door.pid]
            if children:
                return children[0]
            time.sleep(0.005)
        raise ProcessLookupError(f"{self._door.args!r} does not run")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def kill_group(self, number: int) -> None:
        """Sends a signal to all that a terminal would send one to at Ctrl-C."""
        os.killpg(self.pid, number)

    def poll(self) -> int | None:
        """Exit code, or None while it runs; minus the number of the signal that killed it."""
        return self._door.poll()

    def wait(self, seconds: float) -> int:
        """Exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs longer.
        """
        return self._door.wait(seconds)


class Host:
    """A host: namespaces, an address, and the processes in them."""

    def __init__(self, number: int, folder: Path, files: "_Files", stack: ExitStack) -> None:
        """Makes the namespaces; `stack` ends them."""
        self.name = f"host{number + 1}"
        self.address = f"{NETWORK}.{number + 1}"
        self.port = f"port{number + 1}"
        """Interface of the bridge that the host hangs at."""
        self.sshd_log = folder / f"{self.name}.sshd.log"
        """What its sshd says, of every login for one."""
        self._folder = folder
        self._files = files
        command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", "-c", SET_UP_HOST, "sh", self.name, str(files.hosts), str(files.ssh_config)]
        self._holder = stack.enter_context(_holder([*command, sys.executable, FIRST_PROCESS]))
        self.network = f"/proc/{self._holder.pid}/ns/net"
        """File of its network namespace."""
        self._processes = os.readlink(f"/proc/{self._holder.pid}/ns/pid_for_children")
        self.is_removed = False
        self._door = [
            *("nsenter", f"--net={self.network}"),
            *(f"--{name}=/proc/{self._holder.pid}/ns/{file}" for name, file in _JOINED.items()),
        ]

    def popen(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> HostProcess:
        """Starts a command in a session of its own.

        Args:
            command: its words.
            env: environment variables beside those of this process.
            options: those of `subprocess.Popen`; without them the streams are this process's.
        """
        environment = {**os.environ, **self._environment(), **(env or {})}
        # The session begins inside: to a process whose leader is outside it would have none.
        door = subprocess.Popen([*self._door, f"--wd={os.getcwd()}", "setsid", *command], env=environment, **options)
        return HostProcess(door)

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and returns its exit code and output.

        Raises:
            subprocess.TimeoutExpired: it runs longer; it is killed.
        """
        return subprocess.run(
            [*self._door, f"--wd={os.getcwd()}", *command],
            env={**os.environ, **self._environment(), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def start_sshd(self) -> None:
        """Lets others log in; no variable of this process is there.

        Raises:
            RuntimeError: sshd does not start.
        """
        words = " ".join(f'"{name}={value}"' for name, value in self._environment().items())
        config, log = self._folder / f"{self.name}.sshd_config", self.sshd_log
        config.write_text(SSHD_CONFIG.format(folder=self._files.folder, address=self.address, variables=words))
        with log.open("wb") as file:
            sshd = self.popen(
                [_find("sshd") or "sshd", "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        while "Server listening" not in log.read_text(errors="replace"):
            if sshd.poll() is not None:
                raise RuntimeError(f"sshd ended with code {sshd.poll()}: {log.read_text(errors='replace')}")
            time.sleep(0.01)

    def processes(self) -> dict[int, str]:
        """Command lines of its living processes by their ids as seen from outside, without its first process and sshd's listener."""
        found = {}
        for pid, facts in _processes():
            if facts.namespace == self._processes and facts.state not in "ZX" and facts.parent != self._holder.pid:
                with suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if not words.startswith("sshd: ") or "[listener]" not in words:
                        found[pid] = words.strip()
        return found

    def assert_idle(self, within_seconds: float = 5) -> None:
        """Asserts that nothing runs but what ran at the beginning."""
        deadline = time.monotonic() + within_seconds
        while living := self.processes():
            assert time.monotonic() < deadline, f"{self.name}: still running after {within_seconds} s: {living}"
            time.sleep(0.02)

    def kill_all(self) -> None:
        """Kills every process at once, sshd too; the network stays as it is, so that connections to it are refused."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        self._holder.stdin.flush()
        self._holder.stdout.readline()

    def end(self) -> None:
        """Ends all its processes and with them its namespaces."""
        self.is_removed = True
        self._holder.kill()
        self._holder.wait()

    @staticmethod
    def _environment() -> dict[str, str]:
        return {"TMPDIR": "/run/tmp"}


class Hosts(Sequence[Host]):
    """The hosts and the bridge between them."""

    def __init__(self, hosts: Sequence[Host], bridge_network: str) -> None:
        """Takes hosts that are connected already."""
        self._hosts = tuple(hosts)
        self._bridge_network = bridge_network
        self._inside = ("nsenter", f"--net={bridge_network}")

    def __len__(self) -> int:
        """How many there are, removed ones too."""
        return len(self._hosts)

    def __getitem__(self, number: Any) -> Any:
        """A host by its number from 0."""
        return self._hosts[number]

    def namespaces(self) -> list[str]:
        """The kernel's names of the network namespaces, the bridge's too."""
        return [os.readlink(file) for file in (self._bridge_network, *(host.network for host in self._hosts))]

    def set_link(self, host: Host, *, is_up: bool) -> None:
        """Lets the packets of a host through or drops them, both ways and silently: neither side sees its interface go down."""
        self._run("bridge", "link", "set", "dev", host.port, "state", "forwarding" if is_up else "disabled")

    def remove(self, host: Host) -> None:
        """Switches a host off for good: its processes are gone, and nothing answers under its address."""
        self.set_link(host, is_up=False)
        host.end()

    @contextmanager
    def cut(self, host: Host) -> Iterator[None]:
        """Drops all packets of a host as long as it is entered."""
        self.set_link(host, is_up=False)
        try:
            yield
        finally:
            self.set_link(host, is_up=True)

    @contextmanager
    def slowed(self, *, bytes_per_second: float | None = None, delay_seconds: float = 0) -> Iterator[None]:
        """Makes the links slow as long as it is entered.

        Args:
            bytes_per_second: what every host can receive, and thus what two can send each other in either direction, headers included;
                None: no limit.
            delay_seconds: how much longer a packet is on its way, in either direction. It costs a share of a core, about half of one
                at 25 MB/s.
        """
        with ExitStack() as stack:
            if delay_seconds:
                stack.enter_context(self._delayed(delay_seconds))
            if bytes_per_second is not None:
                stack.enter_context(self._limited(bytes_per_second))
            yield

    @contextmanager
    def _limited(self, bytes_per_second: float) -> Iterator[None]:
        limit = ("tbf", "rate", f"{int(bytes_per_second * 8)}bit", "burst", str(BURST_BYTES))
        try:
            for host in self._connected():
                self._run("tc", "qdisc", "replace", "dev", host.port, "root", *limit, "latency", f"{QUEUE_SECONDS}s")
            yield
        finally:
            for host in self._connected():
                self._run("tc", "qdisc", "delete", "dev", host.port, "root")

    @contextmanager
    def _delayed(self, seconds: float) -> Iterator[None]:
        ports = [host.port for host in self._connected()]
        command = [*self._inside, sys.executable, "-c", DELAY_LINE, str(seconds), *ports]
        try:
            with _holder(command):
                for port in ports:
                    self._run("ip", "link", "add", f"br-{port}", "type", "bridge")
                    self._run("ip", "link", "set", f"br-{port}", "up")
                    self._run("ip", "link", "set", f"far-{port}", "master", BRIDGE, "up")
                    for each in (f"near-{port}", port):
                        self._run("ip", "link", "set", each, "master", f"br-{port}", "up")
                yield
        finally:
            for host in self._connected():
                self._run("ip", "link", "set", host.port, "master", BRIDGE)
            for port in ports:
                self._run("ip", "link", "delete", f"br-{port}")

    def _connected(self) -> list[Host]:
        return [host for host in self._hosts if not host.is_removed]

    def _run(self, *words: str) -> None:
        _run([*self._inside, *words])


@contextmanager
def make_hosts(folder: Path, count: int = 2) -> Iterator[Hosts]:
    """Hosts named host1, host2, ... that know each other's names and log in to each other by `ssh NAME`.

    Args:
        folder: for keys, configurations and logs of ssh.
        count: how many.

    Raises:
        RuntimeError: they cannot be made here; `why_no_hosts` says so before.
    """
    files = _write_files(folder, count)
    with ExitStack() as stack:
        bridge = stack.enter_context(_holder(["unshare", "--net", sys.executable, "-c", FIRST_PROCESS]))
        network = f"/proc/{bridge.pid}/ns/net"
        hosts = [Host(number, folder, files, stack) for number in range(count)]
        inside = ("nsenter", f"--net={network}")
        _run([*inside, "ip", "link", "add", BRIDGE, "type", "bridge"])
        _run([*inside, "ip", "link", "set", BRIDGE, "up"])
        for host in hosts:
            pair = ("type", "veth", "peer", "name", INTERFACE, "netns", host.network)
            _run([*inside, "ip", "link", "add", host.port, *pair])
            _run([*inside, "ip", "link", "set", host.port, "master", BRIDGE, "up"])
            for words in (("address", "add", f"{host.address}/24", "dev", INTERFACE), ("link", "set", INTERFACE, "up")):
                _run(["nsenter", f"--net={host.network}", "ip", *words])
        for host in hosts:
            host.start_sshd()
        yield Hosts(hosts, network)


class _Files(NamedTuple):
    """What all hosts share."""

    folder: Path
    hosts: Path
    ssh_config: Path


def _write_files(folder: Path, count: int) -> _Files:
    files = _Files(folder, folder / "hosts", folder / "ssh_config")
    names = {f"{NETWORK}.{number}": f"host{number}" for number in range(1, count + 1)}
    files.hosts.write_text(
        "".join(f"{address} {name}\n" for address, name in {"127.0.0.1": "localhost", **names}.items())
    )
    files.ssh_config.write_text(SSH_CONFIG.format(folder=folder))
    for key in ("key", "host_key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(folder / key)])
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name},{address} {public}" for address, name in names.items()))
    return files


_JOINED = {"uts": "uts", "ipc": "ipc", "mount": "mnt", "pid": "pid_for_children"}


@contextmanager
def _holder(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds namespaces until the end of the context, or of this process."""
    with tempfile.TemporaryFile() as errors:
        # Of its own session, so that a Ctrl-C for the tests does not come first.
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                errors.seek(0)
                raise RuntimeError(errors.read().decode(errors="replace").strip())
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


class _Facts(NamedTuple):
    state: str
    parent: int
    namespace: str


def _processes() -> Iterator[tuple[int, _Facts]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, ValueError):
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
                state, parent, *_ = stat.rpartition(")")[2].split()
                yield int(entry), _Facts(state, int(parent), os.readlink(f"/proc/{entry}/ns/pid"))


def _find(tool: str) -> str | None:
    """Path of a program, which may be one of those that only root has in its path."""
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, each node under a host name of its own.

Everything is real but the machines: both nodes are this one, told apart by their ports and names. Nothing outside of the cluster's folder is read
or written, so several clusters, and one of the machine's own, do not see each other.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spade_t5.testing.processes import free_port

NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
KILL_WAIT_SECONDS = 15
"""Between SIGTERM and SIGKILL, at a job's end by force."""
_START_SECONDS = 60.0
_STOP_SECONDS = 5.0

_CONFIG = """
ClusterName=spade
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait={kill_wait}
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
"""
# A job that is put back waits for cred_expire seconds, two minutes by default, before it starts again.


def why_no_slurm() -> str | None:
    """Why no cluster can be made here; None if it can."""
    missing = [program for program in PROGRAMS if _which(program) is None]
    if missing:
        return f"SLURM is not installed here: no {', '.join(missing)}"
    return None if os.getuid() == 0 else "SLURM is not started here: it takes root"


class SlurmCluster:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        """Variables for every command that is to find this cluster."""

    def run(self, *command: str, stdin: str = "", check: bool = True) -> str:
        """What a command such as `scontrol` prints; its failure fails the calling test."""
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=self.environment, check=False)
        assert not check or done.returncode == 0, f"{command}: code {done.returncode}\n{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by its own names."""
        words = self.run("scontrol", "show", "job", "--oneliner", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(
        self, number: int, condition: Callable[[Mapping[str, str]], bool], seconds: float = 120
    ) -> dict[str, str]:
        """Waits until what `job` says fulfils a condition, and returns it."""
        deadline = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.1)
        return job

    def wait_for_end(self, number: int, seconds: float = 240) -> tuple[str, str]:
        """Waits for a job's end and returns its state and its exit code, as `CODE:SIGNAL`."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "STOPPED")
        job = self.wait_for(number, lambda job: job["JobState"] not in going, seconds)
        return job["JobState"], job["ExitCode"]

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        paths = [path for path in self.folder.iterdir() if path.suffix in (".log", ".out")]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-3000:]}" for path in paths)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of the nodes `NODES`, both idle; at the end its jobs are cancelled and every process that belongs to it is killed."""
    # Not in a test's own folder: munged's socket must have a short path, and be open to all.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with _cluster_in(folder) as cluster:
            yield cluster


@contextmanager
def _cluster_in(folder: Path) -> Iterator[SlurmCluster]:
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = os.uname().nodename
    lines = _CONFIG.format(host=host, port=free_port(), folder=folder, kill_wait=KILL_WAIT_SECONDS)
    for node in NODES:
        # More cores than there are, so that several runs of tests never wait for one.
        lines += f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 State=UNKNOWN\n"
    lines += f"PartitionName=gpu Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "slurm.conf").write_text(lines)
    cluster = SlurmCluster(folder)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
    files["seed-file"] = "munge.seed"
    with ExitStack() as stack:
        stack.callback(_kill_all, cluster)
        _start(
            cluster,
            "munged",
            ["munged", "--foreground", "--force", *(f"--{key}={folder / file}" for key, file in files.items())],
        )
        _wait(cluster, lambda: (folder / "munge.socket").exists())
        _start(cluster, "slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            # The shell is the first process of a process namespace: with it the kernel kills the node's jobs, whatever ends this process.
            machine = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            named = [*machine, "sh", "-c", f"hostname {node} && slurmd -D -N {node}; exit $?"]
            _start(cluster, f"slurmd-{node}", named)
        _wait(
            cluster, lambda: cluster.run("sinfo", "--noheader", "--format=%t %D", check=False).split() == ["idle", "2"]
        )
        yield cluster
        cluster.run("scancel", "--state=PENDING", check=False)
        cluster.run("scancel", "--state=RUNNING", check=False)


def _start(cluster: SlurmCluster, name: str, command: Sequence[str]) -> None:
    """Starts a daemon that dies with this process, whatever ends it."""
    with (cluster.folder / f"{name}.out").open("wb") as out:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**cluster.environment, "PATH": _PATH},
            start_new_session=True,
        )
    cluster.daemons.append(daemon)


def _wait(cluster: SlurmCluster, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not condition():
        is_alive = all(daemon.poll() is None for daemon in cluster.daemons)
        assert is_alive, f"a daemon ended\n{cluster.logs()}"
        assert time.monotonic() < deadline, f"no cluster after {_START_SECONDS} s\n{cluster.logs()}"
        time.sleep(0.05)


def _kill_all(cluster: SlurmCluster) -> None:
    """Kills daemons, steps and jobs: whatever was told of this cluster's configuration."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    own = os.getpid()
    deadline = time.monotonic() + _STOP_SECONDS
    while pids := [pid for pid in _processes() if pid != own and mark in _environment_of(pid).split(b"\0")]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"processes {pids} of the cluster do not die"
        for daemon in cluster.daemons:
            daemon.poll()
        time.sleep(0.02)


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _which(program: str) -> str | None:
    return shutil.which(program, path=_PATH)

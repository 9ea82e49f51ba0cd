"""`spade-t5 launch hostfile` on two hosts: links are cut, hosts are killed and taken away, and the run ends as if nothing had happened."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from spade_t5.checkpoint import list_checkpoints, verify_checkpoint
from spade_t5.launch.cli import main
from spade_t5.testing import documented, guide, launch_ranks
from spade_t5.testing.background import BackgroundLaunch
from spade_t5.testing.hosts import Host, Hosts, hosts_or_skip
from spade_t5.testing.runs import assert_exact, attempts, lineage, write_recipe

SPADE_T5 = [sys.executable, "-m", "spade_t5.launch"]
STEPS = 30
LOST_AFTER = 5
WAIT_FOR_NODES = 30
"""Long enough for two of them to be started on a slow machine."""
STEP_SECONDS = 8
START = "spade-t5 launch hostfile --hostfile hosts --nnodes"
START_WITH_VARIABLES = "spade-t5 launch hostfile --hostfile hosts --env WANDB_API_KEY"
"""Beginnings of the guide's commands."""
SECRET = "never-to-be-seen-0123456789"


class Launched(BackgroundLaunch):
    """The guide's `spade-t5 launch hostfile` on host1, and what it started on all hosts; as a context it leaves nothing running.

    Args:
        hosts: all of them.
        recipe: what is run, in place of the guide's.
        run_dir: its folder.
        words: settings.
        options: of the launcher, over the guide's.
        slots: ranks of each host.
        env: variables of the launcher.
        start: beginning of the command in the guide.
    """

    def __init__(
        self,
        hosts: Hosts,
        recipe: Path,
        run_dir: Path,
        *words: str,
        options: tuple[str, ...] = (),
        slots: tuple[int, ...] = (1, 1),
        env: dict[str, str] | None = None,
        start: str = START,
    ) -> None:
        super().__init__(run_dir)
        self._hosts = hosts
        hostfile = run_dir.parent / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots={count}\n" for host, count in zip(hosts, slots, strict=True)))
        changes = {
            "hosts": [str(hostfile)],
            "--": ["--lost-after", str(LOST_AFTER), *options, "--"],
            "c4-base": [str(recipe), *words],
            "run_dir=/shared/runs/base": [f"run_dir={run_dir}"],
            "data.store=/shared/stores/c4": [],  # the recipe mixes several
            **({"3:4": [str(len(hosts))]} if start == START else {}),
        }
        command = [*SPADE_T5, *guide.command("multinode.md", start, changes)]
        with self.log.open("ab") as err:
            self._launcher = hosts[0].popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                env={"OMP_NUM_THREADS": "1", **(env or {})},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._launcher.poll() is None:
            self._launcher.kill()
        if kind is not None:
            for host in self._hosts:
                host.kill_all()
                host.start_sshd()

    def send(self, number: int) -> None:
        self._launcher.kill(number)

    def send_to_group(self, number: int) -> None:
        """As Ctrl-C in its terminal sends SIGINT."""
        self._launcher.kill_group(number)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self._launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.stderr[-4000:]}") from None

    def is_running(self) -> bool:
        return self._launcher.poll() is None

    def wait_for_more_steps(self, count: int) -> None:
        """Until so many more were made."""
        self.wait_for_steps(len(attempts(self.run_dir)) + count)

    def said(self) -> list[str]:
        """What the launcher said."""
        return [line for line in self.stderr.splitlines() if line.startswith("spade-t5 launch: ")]


def ranks_on(host: Host) -> list[psutil.Process]:
    """Ranks of a host, in order; a loader process has the words of its rank, but not its parent."""
    running = host.processes()
    ranks = [psutil.Process(pid) for pid, words in running.items() if "/rank.py " in words]
    agents = [process.pid for process in ranks if "torch.distributed.run" in process.cmdline()]
    found = [process for process in ranks if process.ppid() in agents]
    return sorted(found, key=lambda process: int(process.environ()["LOCAL_RANK"]))


def is_training_on(host: Host) -> bool:
    return any("/rank.py " in words for words in host.processes().values())


def is_launching_on(host: Host) -> bool:
    return any("spade_t5" in words for words in host.processes().values())


def wait_for_end_of(condition: Callable[[Host], bool], host: Host, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while condition(host):
        assert time.monotonic() < deadline, host.processes()
        time.sleep(0.1)


def assert_idle(hosts: Hosts, within_seconds: float = 5) -> None:
    for host in hosts:
        if not host.is_removed:
            host.assert_idle(within_seconds)


def assert_saved_as_stopped(run_dir: Path) -> None:
    """The newest checkpoint is good, and of the last step."""
    stopped = max(lineage(run_dir))
    assert stopped < STEPS
    newest = list_checkpoints(run_dir / "checkpoints")[-1]
    assert newest.name == f"step-{stopped:08d}"
    verify_checkpoint(newest)


def assert_as_good(run_dir: Path, expected: Path) -> None:
    """The same samples, targets and learning rates, and losses as close as sums in another order are."""
    steps, expected_steps = lineage(run_dir), lineage(expected)
    assert steps.keys() == expected_steps.keys()
    for step, facts in steps.items():
        assert facts[2:] == expected_steps[step][2:]
        assert float.fromhex(facts.loss) == pytest.approx(float.fromhex(expected_steps[step].loss), rel=1e-5)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_or_skip(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(
        path,
        [store],
        model={"dropout_rate": 0.0},
        steps=STEPS,
        save_every_steps=3,
        loader_workers=1,
        keep_checkpoints=2,
        timeouts={"step_seconds": STEP_SECONDS},
    )


def train_here(recipe: Path, run_dir: Path, num_ranks: int) -> None:
    logs = run_dir.parent / f"{run_dir.name}-logs"
    with launch_ranks(["pretrain", str(recipe), f"run_dir={run_dir}"], num_ranks=num_ranks, log_dir=logs) as group:
        assert group.wait() == [0] * num_ranks, group.stderr(0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(recipe, run_dir, 2)
    return run_dir


def test_it_trains_across_both_hosts_and_shows_nobody_its_secrets(
    hosts: Hosts,
    recipe: Path,
    undisturbed: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = tmp_path / "run"
    options = ("--env", "WANDB_API_KEY")
    with Launched(hosts, recipe, run_dir, env={"WANDB_API_KEY": SECRET}, start=START_WITH_VARIABLES) as launched:
        launched.wait_for_steps(4)
        words = [line for host in hosts for line in host.processes().values()]
        for number, host in enumerate(hosts):
            (rank,) = ranks_on(host)
            environment = rank.environ()
            assert environment["SPADE_T5_PLACE"].startswith(f"{number},2,{number},2,{hosts[0].address},")
            assert environment["WANDB_API_KEY"] == SECRET
            assert environment["NCCL_IB_HCA"] == "mlx5", "as the guide says"
            lines = host.run(["ss", "-Hltn"]).stdout.splitlines()
            assert {line.split()[3].rpartition(":")[0] for line in lines} <= {host.address, "127.0.0.1"}
        assert launched.wait() == 0, launched.stderr
    assert not [line for line in words if SECRET in line]
    assert_idle(hosts)
    assert launched.said() == []
    assert_exact(run_dir, undisturbed)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    hostfile = ("--hostfile", str(tmp_path / "hostfile"), "--address", hosts[0].address)
    command = ["pretrain", str(recipe), f"run_dir={run_dir}"]
    assert main(["launch", "hostfile", *hostfile, *options, "--dry-run", "--", *command]) == 0
    shown = capfd.readouterr().out
    assert "WANDB_API_KEY" in shown
    assert SECRET not in shown
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


COLLECTIVE_SECONDS = 30
"""How long collectives wait, in the test of the link that is cut for more than twice as long; elsewhere it is half an hour."""
PHASES = ("compile", "evaluation", "save")
SHORT_COLLECTIVES = f"""
import os, sys
def shorten(event, arguments):
    if event == "import" and arguments[0] == "spade_t5.launch.config_files":
        from spade_t5.training import distributed
        distributed.TIMEOUT_MARGIN_SECONDS = {COLLECTIVE_SECONDS - 25}
        join = distributed.join
        def tell(seconds):
            with open(__file__ + ".said", "a") as file:
                print(seconds, file=file)
            join(seconds)
        distributed.join = tell
if "LOCAL_RANK" in os.environ:
    sys.addaudithook(shorten)
"""


def test_a_link_cut_for_twice_the_collectives_timeout_and_a_killed_host_cost_restarts_only_and_a_request_stops_all(
    hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir, hook = tmp_path / "run", tmp_path / "sitecustomize.py"
    hook.write_text(SHORT_COLLECTIVES)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    limits = [f"training.timeouts.{phase}_seconds=25" for phase in PHASES]
    with Launched(hosts, recipe, run_dir, *limits, env={"PYTHONPATH": path}) as launched:
        launched.wait_for_steps(7)
        told = hook.with_name(f"{hook.name}.said").read_text().split()
        assert set(map(float, told)) == {COLLECTIVE_SECONDS}
        with hosts.cut(hosts[1]):
            began = time.monotonic()
            launched.wait_until(lambda: "starting again" in launched.stderr)
            launched.wait_until(lambda: not any(map(is_training_on, hosts)))
            time.sleep(max(2 * COLLECTIVE_SECONDS + 1 - (time.monotonic() - began), 0))
        launched.wait_for_more_steps(5)
        hosts[1].kill_all()
        launched.wait_until(lambda: launched.stderr.count("starting again") == 2)
        hosts[1].start_sshd()
        launched.wait_for_more_steps(3)
        launched.send(signal.SIGUSR1)
        assert launched.wait(60) == 75, launched.stderr
    assert_idle(hosts)
    lost = [line for line in launched.said() if line.startswith("spade-t5 launch: lost")]
    assert lost == [
        f"spade-t5 launch: lost host2: no sign of it for {LOST_AFTER} s",
        "spade-t5 launch: lost host2: its connection broke",
    ]
    for line in launched.said():
        documented(line)
    assert_saved_as_stopped(run_dir)
    train_here(recipe, run_dir, 2)
    assert_exact(run_dir, undisturbed)


def test_without_a_host_that_is_gone_it_goes_on_and_stops_when_asked(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("--nnodes", "1:2", "--wait-for-nodes", str(WAIT_FOR_NODES))
    with hosts_or_skip(tmp_path) as hosts, Launched(hosts, recipe, run_dir, options=options) as launched:
        launched.wait_for_steps(7)
        hosts.remove(hosts[1])
        launched.wait_until(lambda: "going on with 1 of 2 nodes, without host2" in launched.stderr)
        launched.wait_for_more_steps(4)
        launched.send(signal.SIGTERM)
        assert launched.wait(60) == 75, launched.stderr
        assert_idle(hosts)
    for line in launched.said():
        documented(line)
    assert_saved_as_stopped(run_dir)
    train_here(recipe, run_dir, 1)
    assert_as_good(run_dir, undisturbed)


def test_a_wrong_config_is_refused_before_anything_starts(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    log = hosts[1].sshd_log.read_text()
    with Launched(hosts, recipe, tmp_path / "run", "training.stepz=3") as launched:
        assert launched.wait() == 2
    assert launched.stderr.startswith("spade-t5 launch: training.stepz: unknown config key")
    assert launched.stderr.count("\n") == 1
    assert hosts[1].sshd_log.read_text() == log, "nobody has logged in"
    assert not (tmp_path / "run").exists()
    assert_idle(hosts)


@pytest.mark.faults
def test_ranks_that_notice_the_cut_before_the_launcher_does_name_the_host(
    hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Launched(hosts, recipe, run_dir, options=("--lost-after", "40")) as launched:
        launched.wait_for_steps(7)
        with hosts.cut(hosts[1]):
            launched.wait_until(lambda: "starting again" in launched.stderr)
        assert launched.wait() == 0, launched.stderr
    assert_idle(hosts)
    assert re.search(r"hanging: rank 1 \(host2, pid \d+\) did not answer", launched.stderr)
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
def test_a_short_cut_costs_nothing(hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    with Launched(hosts, recipe, tmp_path / "run", options=("--lost-after", "10")) as launched:
        for count in (3, 9, 15):
            launched.wait_for_steps(count)
            with hosts.cut(hosts[count % 2]):
                time.sleep(2)
        assert launched.wait() == 0, launched.stderr
    assert_idle(hosts)
    assert launched.said() == []
    assert_exact(tmp_path / "run", undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["host killed", "host killed behind a cut", "launcher killed"])
def test_the_other_host_ends_by_itself_and_the_same_command_goes_on(
    how: str, hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Launched(hosts, recipe, run_dir, options=("--wait-for-nodes", str(WAIT_FOR_NODES))) as launched:
        launched.wait_for_steps(7)
        if how == "launcher killed":
            launched.send(signal.SIGKILL)
            assert_idle(hosts, 15)
        else:
            with contextlib.ExitStack() as stack:
                if how == "host killed behind a cut":
                    stack.enter_context(hosts.cut(hosts[0]))
                hosts[0].kill_all()
                wait_for_end_of(is_training_on, hosts[1], 4 * LOST_AFTER)
                wait_for_end_of(is_launching_on, hosts[1], 2 * WAIT_FOR_NODES)  # behind a cut it looks for the launcher
            hosts[1].kill_all()  # there sshd waits longer for the other end
            hosts[1].start_sshd()
            hosts[0].start_sshd()
    with Launched(hosts, recipe, run_dir) as launched:
        assert launched.wait() == 0, launched.stderr
    assert_idle(hosts)
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
def test_too_few_hosts_end_the_run(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with hosts_or_skip(tmp_path) as hosts:
        options = ("--nnodes", "2", "--wait-for-nodes", str(WAIT_FOR_NODES))
        with Launched(hosts, recipe, run_dir, options=options) as launched:
            launched.wait_for_steps(7)
            hosts.remove(hosts[1])
            assert launched.wait() == 1, launched.stderr
        assert_idle(hosts)
    said = [line for line in launched.said() if "--nnodes demands 2" in line]
    assert f"host2: no sign of it within --wait-for-nodes {WAIT_FOR_NODES} s; 1 of 2 nodes are there" in said[0]
    documented(said[0])
    train_here(recipe, run_dir, 2)
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("to", ["launcher", "terminal", "node", "rank"])
def test_any_request_to_stop_ends_in_75_and_loses_nothing(
    number: signal.Signals, to: str, hosts: Hosts, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Launched(hosts, recipe, run_dir) as launched:
        launched.wait_for_steps(4)
        if to == "launcher":
            launched.send(number)
        elif to == "terminal":
            launched.send_to_group(number)
        elif to == "node":
            node = next(pid for pid, words in hosts[1].processes().items() if "launch node" in words and "-m" in words)
            os.kill(node, number)
        else:
            ranks_on(hosts[1])[0].send_signal(number)
        assert launched.wait(60) == 75, launched.stderr
    assert_idle(hosts)
    assert_saved_as_stopped(run_dir)
    train_here(recipe, run_dir, 2)
    assert [step for step, _ in attempts(run_dir)] == list(range(1, STEPS + 1))
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
def test_what_the_ranks_refuse_ends_with_2_at_once(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    with Launched(hosts, recipe, tmp_path / "run", "training.deepspeed=null") as launched:
        assert launched.wait() == 2, launched.stderr
    assert_idle(hosts)
    assert launched.said() == [
        "spade-t5 launch: training.deepspeed: null, but 2 processes were launched; set training.deepspeed.zero_stage=1"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_rank_that_always_dies_ends_the_run_with_1(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_ON_HOST_2)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ("--max-restarts", "1")
    with Launched(hosts, recipe, tmp_path / "run", options=options, env={"PYTHONPATH": path}) as launched:
        assert launched.wait() == 1, launched.stderr
    assert_idle(hosts)
    said = launched.said()
    assert [line for line in said if "rank 1: RuntimeError: broken on purpose" in line] == said[0::2][:2]
    assert "starting again, 1 of 1 without a new checkpoint" in said[1]
    assert "giving up after --max-restarts 1 without a new checkpoint" in said[3]


BROKEN_ON_HOST_2 = """
import os, sys
def break_off(event, arguments):
    if event == "import" and arguments[0] == "spade_t5.training.engine":
        raise RuntimeError("broken on purpose")
if "LOCAL_RANK" in os.environ and os.uname().nodename == "host2":
    sys.addaudithook(break_off)
"""


@pytest.mark.faults
def test_hosts_with_different_numbers_of_ranks(hosts: Hosts, recipe: Path, tmp_path: Path) -> None:
    train_here(recipe, tmp_path / "undisturbed", 3)
    with Launched(hosts, recipe, tmp_path / "run", slots=(1, 2)) as launched:
        launched.wait_for_steps(4)
        assert [len(ranks_on(host)) for host in hosts] == [1, 2]
        ranks_on(hosts[1])[1].kill()
        assert launched.wait() == 0, launched.stderr
    assert_idle(hosts)
    assert "rank 2 was killed by SIGKILL" in launched.said()[0]
    assert_exact(tmp_path / "run", tmp_path / "undisturbed")

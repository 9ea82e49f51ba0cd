"""`spade-t5 launch local`: real processes under torchrun that are killed, stopped and asked to end."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest
import torch

from spade_t5.checkpoint import list_checkpoints
from spade_t5.launch import group as launch_group
from spade_t5.launch.cli import main
from spade_t5.launch.ending import Ending
from spade_t5.launch.rank import output_files
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.supervisor import Supervision, supervise
from spade_t5.testing import documented, launch_ranks, run_command
from spade_t5.testing.background import BackgroundLaunch
from spade_t5.testing.runs import assert_exact, attempts, lineage, write_recipe
from spade_t5.training import data as training_data
from spade_t5.training import stopping
from spade_t5.training.deepspeed import DeepSpeedBackend

SPADE_T5 = [sys.executable, "-m", "spade_t5.launch"]
STEPS = 24


class Launched(BackgroundLaunch):
    """A launcher that runs in the background, and the processes below it; as a context it leaves nothing running."""

    def __init__(self, recipe: Path, run_dir: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        super().__init__(run_dir)
        command = [*SPADE_T5, "launch", "local", "--nproc-per-node", "2", *options]
        command += ["--", "pretrain", str(recipe), f"run_dir={run_dir}", *words]
        reader, out = os.pipe()
        os.close(reader)  # nobody reads what it prints, as behind `| head -1`
        with self.log.open("ab") as err, os.fdopen(out, "wb") as closed:
            self._launcher = psutil.Popen(
                command, stdout=closed, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._launcher.poll() is None:
            self._launcher.kill()
            self._launcher.wait()

    @property
    def agent(self) -> psutil.Process:
        (agent,) = self._launcher.children()
        return agent

    @property
    def ranks(self) -> list[psutil.Process]:
        return sorted(self.agent.children(), key=lambda process: int(process.environ()["RANK"]))

    def tree(self) -> list[psutil.Process]:
        return [self._launcher, *self._launcher.children(recursive=True)]

    def kill(self, process: psutil.Process | None = None, number: int = signal.SIGKILL) -> None:
        (process or self._launcher).send_signal(number)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self._launcher.wait(seconds)
        except psutil.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.stderr[-4000:]}") from None

    def is_running(self) -> bool:
        return self._launcher.poll() is None


def assert_gone(processes: list[psutil.Process], within_seconds: float = 2) -> None:
    _, alive = psutil.wait_procs(processes, timeout=within_seconds)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(path, [store], steps=STEPS, save_every_steps=3, loader_workers=1, keep_checkpoints=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with launch_ranks(["pretrain", str(recipe), f"run_dir={folder / 'run'}"], num_ranks=2, log_dir=folder) as group:
        assert group.wait() == [0, 0], group.stderr(0)
    return folder / "run"


def launch_logs(run_dir: Path) -> Path:
    """The only launch's folder of logs."""
    (folder,) = (run_dir / "logs").glob("launch-*")
    return folder


def listening_addresses(processes: list[psutil.Process]) -> Iterator[str]:
    for process in processes:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield connection.laddr.ip


def test_the_run_goes_on_by_itself_after_a_killed_rank_and_a_killed_torchrun(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with Launched(recipe, tmp_path / "run", "--resume", "none") as launched:
        launched.wait_for_steps(7)
        addresses = set(listening_addresses(launched.tree()))
        assert addresses == {"127.0.0.1"}
        before = launched.tree()[1:]
        launched.kill(launched.ranks[1])
        launched.wait_until(lambda: "starting again, 1 of 3" in launched.stderr)
        assert_gone(before)
        steps = len(attempts(launched.run_dir))
        launched.wait_for_steps(steps + 5)
        before = launched.tree()[1:]
        launched.kill(launched.agent)
        launched.wait_until(lambda: launched.stderr.count("starting again, 1 of 3") == 2)
        assert_gone(before)
        assert launched.wait() == 0, launched.stderr
    said = [line for line in launched.stderr.splitlines() if line.startswith("spade-t5 launch: ")]
    log = output_files(launch_logs(tmp_path / "run"), 1)[1]
    assert said[0] == f"spade-t5 launch: rank 1 was killed by SIGKILL; its log is {log}"
    assert said[2] == "spade-t5 launch: torchrun was killed by SIGKILL, and the ranks with it"
    for line in said[:3]:
        documented(line)
    assert_exact(tmp_path / "run", undisturbed)


def test_stopped_by_sigterm_then_killed_then_finished(recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Launched(recipe, run_dir) as launched:
        launched.wait_for_steps(4)
        processes = launched.tree()
        launched.kill(number=signal.SIGTERM)
        assert launched.wait(60) == 75, launched.stderr
        assert_gone(processes)
    step = max(lineage(run_dir))
    assert launched.stderr.splitlines()[-1] == (
        f"spade-t5 launch: stopped at step {step} on request; start the same command again to go on"
    )
    documented(launched.stderr.splitlines()[-1])
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{step:08d}"
    assert step < STEPS
    with Launched(recipe, run_dir) as launched:
        launched.wait_for_steps(step + 2)
        assert [step for step, _ in attempts(run_dir)] == list(range(1, len(attempts(run_dir)) + 1)), "no step was lost"
        processes = launched.tree()
        launched.kill()
        assert_gone(processes)
    with launch_ranks(["pretrain", str(recipe), f"run_dir={run_dir}"], num_ranks=2, log_dir=tmp_path) as group:
        assert group.wait() == [0, 0], group.stderr(0)
    assert_exact(run_dir, undisturbed)


def test_a_config_that_the_ranks_refuse_is_one_message_without_a_restart_or_a_trace(
    recipe: Path, tmp_path: Path
) -> None:
    logs, others = tmp_path / "logs", tmp_path / "logs" / "launch-of-another" / "rank-00000.err"

    def launch_another() -> None:
        others.parent.mkdir(parents=True)
        others.write_text("its own\n")

    meanwhile = threading.Timer(2, launch_another)
    meanwhile.start()
    command = [
        *SPADE_T5,
        "launch",
        "local",
        "--nproc-per-node",
        "2",
        "--log-dir",
        str(logs),
        "--",
        "pretrain",
        str(recipe),
    ]
    done = run_command([*command, f"run_dir={tmp_path / 'run'}", "training.deepspeed=null"])
    meanwhile.join()
    assert done.returncode == 2, done.stderr
    assert [path for path in logs.rglob("*") if path.is_file()] == [others]
    assert done.stderr == (
        "spade-t5 launch: training.deepspeed: null, but 2 processes were launched; set training.deepspeed.zero_stage=1\n"
    )
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_launched_is_said_in_one_line_before_anything_starts(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = (
        (["--nproc-per-node", "0", "--", "pretrain", str(recipe)], "--nproc-per-node: 0 must be at least 1"),
        (["--nproc-per-node", "2", "--grace", "0", "--", "pretrain", str(recipe)], "--grace: 0 must be at least 1"),
        (["--nproc-per-node", "2", "--grace", "nan", "--", "pretrain", str(recipe)], "--grace: nan must be at least 1"),
        (
            ["--nproc-per-node", "2", "--", "export", "run"],
            "export: only pretrain, finetune, doctor run on several processes",
        ),
    )
    for words, message in own:
        assert main(["launch", "local", *words]) == 2
        assert capfd.readouterr().err == f"spade-t5 launch: {message}\n"
        documented(message)
    words = ["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}", "training.stepz=3"]
    assert main(["launch", "local", "--nproc-per-node", "2", "--", *words]) == 2
    assert capfd.readouterr().err.startswith("spade-t5 launch: training.stepz: unknown config key")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_command_and_starts_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}", "--resume", "none"]
    assert main(["launch", "local", "--nproc-per-node", "2", "--dry-run", "--", *words]) == 0
    out = capfd.readouterr().out
    assert "-m torch.distributed.run --nproc-per-node 2" in out
    assert out.rstrip().endswith(" ".join(words))
    assert "GLOO_SOCKET_IFNAME=lo" in out
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_vanished_is_not_trained_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "step-00000003"
    attempts = []

    def lose_checkpoints(number: int, logs: Path) -> Ending:
        attempts.append(number)
        shutil.rmtree(lost)
        run_dir.mkdir(exist_ok=True)  # as somebody may who writes to it
        return Ending(1, "")

    for lost in (run_dir / "checkpoints", run_dir):
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").write_text("{}")
        assert list_checkpoints(run_dir / "checkpoints")
        supervision = Supervision(run_dir=run_dir, logs=tmp_path / "logs" / lost.name, max_restarts=3)
        assert supervise(supervision, lose_checkpoints, LauncherStop()) == 1
        documented(capfd.readouterr().err)
    assert len(attempts) == 2, "none was started again"


def test_the_end_of_the_terminal_is_a_request_to_stop() -> None:
    with handled(signal.SIGHUP, signal.SIG_DFL), LauncherStop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGTERM
    with handled(signal.SIGHUP, signal.SIG_IGN), LauncherStop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_requested, "nohup was asked for"


@contextlib.contextmanager
def handled(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    """Whatever the tests themselves were started with."""
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


def test_folders_of_dead_launchers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new = tmp_path / f"{launch_group.STATE_PREFIX}old", tmp_path / f"{launch_group.STATE_PREFIX}new"
    old.mkdir()
    new.mkdir()
    with launch_group._state_folder() as own:
        for folder in (old, own):
            os.utime(folder, (0, 0))
        launch_group.remove_left_folders()
        assert {path.name for path in tmp_path.iterdir()} == {own.name, new.name}


def test_the_allowed_time_counts_from_the_start_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_began", stopping._began)
    stopping.count_wall_seconds_from(time.monotonic() - 100)
    assert stopping.StopRequests(90).is_stopping
    assert not stopping.StopRequests(200).is_stopping


BROKEN_ON_RANK_1 = """
import os, sys
def break_off(event, arguments):
    if event == "import" and arguments[0] == "spade_t5.training.engine":
        raise RuntimeError("broken on purpose")
if os.environ.get("RANK") == "1":
    sys.addaudithook(break_off)
"""


@pytest.mark.parametrize("max_restarts", [0, pytest.param(2, marks=pytest.mark.faults)])
def test_the_first_error_is_shown_and_starts_are_counted(max_restarts: int, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_ON_RANK_1)
    command = [*SPADE_T5, "launch", "local", "--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
    done = run_command(
        [*command, "--", "pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"],
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )
    assert done.returncode == 1
    logs = launch_logs(tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("spade-t5 launch: ")]
    failure = f"spade-t5 launch: rank 1: RuntimeError: broken on purpose; its log is {logs / 'rank-00001.err'}"
    expected = [failure]
    for start in range(1, max_restarts + 1):
        expected += [f"spade-t5 launch: starting again, {start} of {max_restarts} without a new checkpoint", failure]
    end = f"giving up after --max-restarts {max_restarts} without a new checkpoint; the logs are in {logs}"
    assert said == [*expected, f"spade-t5 launch: {end}"]
    for line in said:
        documented(line)
    assert "broken on purpose" in (logs / "rank-00001.err").read_text()
    assert "broken on purpose" not in (logs / "rank-00000.err").read_text()


def sleep_for_ever(row: int) -> None:
    """A hook: the loader of rank 1 hangs at a row, as on storage that does not answer."""
    if os.environ["RANK"] == "1":
        collate = training_data._Collated.__getitem__

        def hang(self: training_data._Collated, row_numbers: Sequence[int]) -> object:
            while row in row_numbers:
                time.sleep(1)
            return collate(self, row_numbers)

        training_data._Collated.__getitem__ = hang  # type: ignore[method-assign]


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.faults), "loader"])
def test_a_hang_is_noticed_and_named_and_the_next_start_goes_on(
    how: str, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = ["pretrain", str(recipe), f"run_dir={run_dir}"]
    with launch_ranks(
        [*command, "training.timeouts.step_seconds=6"],
        num_ranks=2,
        log_dir=tmp_path / "first",
        hook=sleep_for_ever if how == "loader" else None,
        hook_arguments={"row": 8 * 7 + 1},
    ) as group:
        if how == "stopped":
            while len(attempts(run_dir)) < 5:
                assert group.is_running(), group.stderr(0)
                time.sleep(0.02)
            group.kill(1, signal.SIGSTOP)
        group.wait(90)
        group.assert_gone()
    said = group.stderr(0)
    expected = {"stopped": "did not answer in time", "loader": r"waits for its training rows in data of step \d+"}[how]
    assert re.search(rf"hanging: rank 1 \([^,]+, pid {group.ranks[1]}\) {expected}", said), said
    documented(next(line for line in said.splitlines() if line.startswith("hanging:")))
    for rank in (0, 1):
        assert "most recent call first" in (run_dir / "logs" / f"rank-{rank:05d}.stacks.txt").read_text()
    with launch_ranks(command, num_ranks=2, log_dir=tmp_path / "second") as group:
        assert group.wait() == [0, 0], group.stderr(0)
    assert_exact(run_dir, undisturbed)


def signal_in_backward(rank: int, number: int, times: int) -> None:
    """A hook: a rank is asked to stop between the micro-batches of step 5, once or twice."""
    if int(os.environ["RANK"]) != rank:
        return
    backward, calls = DeepSpeedBackend.backward, itertools.count()

    def interrupted(self: DeepSpeedBackend, loss: torch.Tensor, *, is_last: bool) -> None:
        backward(self, loss, is_last=is_last)
        if next(calls) == 4 * 2:
            for i in range(times):
                time.sleep(1.5 * i)
                os.kill(os.getpid(), number)

    DeepSpeedBackend.backward = interrupted  # type: ignore[method-assign]


def signal_in_save(rank: int, number: int) -> None:
    """A hook: a rank is asked to stop while the checkpoint of step 6 gets its name."""
    if int(os.environ["RANK"]) == rank:

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and str(arguments[1]).endswith("step-00000006"):
                os.kill(os.getpid(), number)

        sys.addaudithook(watch)


def block_save(seconds: float) -> None:
    """A hook: the checkpoint of step 4 does not get its name in time."""

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("step-00000004"):
            time.sleep(seconds)

    sys.addaudithook(watch)


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        (signal_in_backward, {"rank": 1, "number": signal.SIGTERM, "times": 1}),
        (signal_in_save, {"rank": 0, "number": signal.SIGUSR1}),
    ],
    ids=["between micro-batches", "during a save"],
)
def test_a_request_to_one_rank_stops_all_at_one_step_and_loses_none(
    hook: Callable[..., None], arguments: dict[str, int], recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = ["pretrain", str(recipe), f"run_dir={run_dir}"]
    with launch_ranks(command, num_ranks=2, log_dir=tmp_path / "first", hook=hook, hook_arguments=arguments) as group:
        assert group.wait(60) == [75, 75], group.stderr(0)
    stopped = max(lineage(run_dir))
    assert 5 <= stopped < STEPS
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{stopped:08d}"
    with launch_ranks(command, num_ranks=2, log_dir=tmp_path / "second") as group:
        assert group.wait() == [0, 0], group.stderr(0)
    assert [step for step, _ in attempts(run_dir)] == list(range(1, STEPS + 1))
    assert_exact(run_dir, undisturbed)


def test_a_second_request_ends_at_once_and_a_save_that_was_cut_off_is_redone(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = ["pretrain", str(recipe), f"run_dir={run_dir}"]
    twice = {"rank": 1, "number": signal.SIGTERM, "times": 2}
    with launch_ranks(
        command, num_ranks=2, log_dir=tmp_path / "first", hook=signal_in_backward, hook_arguments=twice
    ) as group:
        assert group.wait(60)[1] == 75
        documented(next(line for line in group.stderr(1).splitlines() if line.startswith("SIGTERM came twice")))
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step-00000003"
    assert max(lineage(run_dir)) == 4
    # Then the grace ends in the middle of the last save.
    with launch_ranks(
        [*command, "training.max_wall_seconds=0.001"],
        num_ranks=2,
        log_dir=tmp_path / "second",
        hook=block_save,
        hook_arguments={"seconds": 120},
    ) as group:
        while not (run_dir / "checkpoints" / ".step-00000004.tmp").exists() and group.is_running():
            time.sleep(0.02)
        group.kill("all")
        group.assert_gone()
    with launch_ranks(command, num_ranks=2, log_dir=tmp_path / "third") as group:
        assert group.wait() == [0, 0], group.stderr(0)
    documented(next(line for line in group.stderr(0).splitlines() if "the save was cut off" in line))
    assert_exact(run_dir, undisturbed)


BLOCKED_SAVE = """
import sys, time
def block(event, arguments):
    if event == "os.rename" and ".step-" in str(arguments[0]) and not str(arguments[1]).endswith("step-00000003"):
        time.sleep(600)
sys.addaudithook(block)
"""


@pytest.mark.faults
def test_a_grace_that_is_too_short_is_said(
    recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(BLOCKED_SAVE)
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "hooks"), prepend=os.pathsep)
        with Launched(recipe, run_dir, options=("--grace", "3")) as launched:
            launched.wait_for_steps(4)
            processes = launched.tree()
            launched.kill(number=signal.SIGTERM)
            assert launched.wait(30) == 75, launched.stderr
            assert_gone(processes)
    documented(launched.stderr.splitlines()[-1])
    with launch_ranks(["pretrain", str(recipe), f"run_dir={run_dir}"], num_ranks=2, log_dir=tmp_path) as group:
        assert group.wait() == [0, 0], group.stderr(0)
    documented(next(line for line in group.stderr(0).splitlines() if "the save was cut off" in line))
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("to", ["launcher", "rank 0", "rank 1", "everything"])
def test_any_request_to_stop_ends_in_75_and_loses_nothing(
    number: signal.Signals, to: str, recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Launched(recipe, run_dir) as launched:
        launched.wait_for_steps(4)
        processes = launched.tree()
        targets = {"launcher": processes[:1], "rank 0": launched.ranks[:1], "rank 1": launched.ranks[1:]}
        for process in targets.get(to, processes):
            launched.kill(process, number)
        assert launched.wait(60) == 75, launched.stderr
        assert_gone(processes)
    with launch_ranks(["pretrain", str(recipe), f"run_dir={run_dir}"], num_ranks=2, log_dir=tmp_path) as group:
        assert group.wait() == [0, 0], group.stderr(0)
    assert [step for step, _ in attempts(run_dir)] == list(range(1, STEPS + 1))
    assert_exact(run_dir, undisturbed)


@pytest.mark.faults
def test_a_second_request_ends_at_once_with_the_last_checkpoint_intact(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with Launched(recipe, run_dir, "training.global_batch_rows=512", "training.save_every_steps=1") as launched:
        launched.wait_for_steps(1)
        processes = launched.tree()
        launched.kill(number=signal.SIGTERM)
        time.sleep(1.5)
        launched.kill(number=signal.SIGTERM)
        assert launched.wait(10) == 75, launched.stderr
        assert_gone(processes)
    said = [path.read_text() for path in launch_logs(run_dir).glob("rank-*.err")]
    assert any("SIGTERM came twice" in text for text in said)
    assert run_command([*SPADE_T5, "verify", str(list_checkpoints(run_dir / "checkpoints")[-1])]).returncode == 0


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_replaced(rank: int, recipe: Path, undisturbed: Path, tmp_path: Path) -> None:
    with Launched(recipe, tmp_path / "run", "training.timeouts.step_seconds=5") as launched:
        launched.wait_for_steps(5)
        launched.kill(launched.ranks[rank], signal.SIGSTOP)
        assert launched.wait() == 0, launched.stderr
    assert len(re.findall(rf"hanging: rank {rank} \(.*, pid \d+\) did not answer", launched.stderr)) == 1
    assert_exact(tmp_path / "run", undisturbed)

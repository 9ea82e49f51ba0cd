"""Pretraining killed before every operation by which a save changes the disk, retention included; and in the middle of a file.

Every launch is killed one operation later than the one before, so that what a kill leaves behind is what the next launch begins with. Audit
hooks see files and folders being made, renamed and deleted before it happens; `os.fsync` is replaced.
"""

import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint import list_checkpoints, verify_checkpoint
from spade_t5.testing.ranks import RankGroup, launch_ranks
from spade_t5.testing.runs import assert_exact, write_recipe

NUM_RANKS = 2
SMALL = {"num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_ff": 64}
STEPS = 20
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def on_operations_of_first_save(checkpoints: str, act: Callable[[int, str], None]) -> None:
    """Calls `act` with number, from 1, and name before each operation that changes the disk, in the first save of this rank."""
    state: dict[str, Any] = {"saving": None, "count": 0, "last": None, "has_ended": False}
    lock = threading.Lock()

    def on_operation(name: str, path: str) -> None:
        if not path.startswith(checkpoints):
            return
        saved = next((part for part in Path(path).parts if part.startswith(".step-") and part.endswith(".tmp")), None)
        with lock:
            if state["saving"] is None and name in ("os.mkdir", "create"):
                state["saving"] = saved
            if state["saving"] is None or state["last"] == (name, path):  # one opening of a file is two events
                return
            state["has_ended"] |= saved not in (None, state["saving"])
            if state["has_ended"]:
                return
            state["last"] = (name, path)
            state["count"] += 1
            act(state["count"], f"{name} {Path(path).name}")

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.fsdecode(arguments[0])
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT):
                return
            event = "create"
        if event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None):
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        on_operation(event, path)

    fsync = os.fsync

    def audited_fsync(descriptor: int) -> None:
        on_operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = audited_fsync  # type: ignore[assignment]
    sys.addaudithook(audit)


def kill_at_operation(checkpoints: str, rank: int, number: int) -> None:
    """A hook: kills the rank at so manieth operation of its first save, and prints which that is."""
    if int(os.environ["RANK"]) == rank:

        def act(count: int, name: str) -> None:
            if count == number:
                print(name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

        on_operations_of_first_save(checkpoints, act)


def die_in_shard(checkpoints: str, rank: int, after_seconds: float) -> None:
    """A hook: the rank stalls while it forces its first file to disk, and then dies."""
    if int(os.environ["RANK"]) == rank:

        def act(count: int, name: str) -> None:
            if name.startswith("fsync rank-"):
                time.sleep(after_seconds)
                os.kill(os.getpid(), signal.SIGKILL)

        on_operations_of_first_save(checkpoints, act)


def die_in_file(checkpoints: str, rank: int, at_byte: int) -> None:
    """A hook: the kernel kills the rank when it has written so many bytes of a file."""
    if int(os.environ["RANK"]) == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it

        def act(count: int, name: str) -> None:
            if count == 1:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, at_byte))

        on_operations_of_first_save(checkpoints, act)


class Run:
    """A run that is launched again and again."""

    def __init__(self, folder: Path, stores: Sequence[Path], zero_stage: int) -> None:
        self.run_dir = folder / "run"
        self.undisturbed = folder / "undisturbed"
        self._logs = folder / "logs"
        self._recipe = write_recipe(
            folder / "recipe.yaml",
            stores,
            model=SMALL,
            steps=STEPS,
            global_batch_rows=4,
            loader_workers=0,
            save_every_steps=1,
            keep_checkpoints=1,
            deepspeed={"zero_stage": zero_stage, "persistence_threshold_numel": 500},
        )
        with self.start(self.undisturbed) as group:
            assert group.wait() == [0, 0], group.errors()
        with self.start(self.run_dir) as group:  # so that every save has a checkpoint to delete
            while not self.newest_step():
                assert group.is_running(), group.errors()
                time.sleep(0.01)
            group.kill("all")
            group.assert_gone()

    def start(self, run_dir: Path, hook: Callable[..., None] | None = None, **arguments: Any) -> RankGroup:
        return launch_ranks(
            ["pretrain", str(self._recipe), f"run_dir={run_dir}"],
            num_ranks=NUM_RANKS,
            log_dir=self._logs,
            hook=hook,
            hook_arguments={"checkpoints": str(run_dir / "checkpoints"), **arguments} if hook is not None else None,
        )

    def launch(self, hook: Callable[..., None] | None = None, **arguments: Any) -> tuple[list[int | None], str]:
        """Goes on with the run until it ends or is killed; returns exit codes, and what the killed rank printed."""
        with self.start(self.run_dir, hook, **arguments) as group:
            codes = group.wait(120)
            group.assert_gone()
            return codes, group.stdout(arguments.get("rank", 0)).strip()

    def newest_step(self) -> int:
        """Step of the newest checkpoint, which must be whole."""
        found = list_checkpoints(self.run_dir / "checkpoints")
        if not found:
            return 0
        verify_checkpoint(found[-1])
        return int(found[-1].name.removeprefix("step-"))

    def finish(self) -> None:
        codes, _ = self.launch()
        assert codes == [0, 0]
        assert_exact(self.run_dir, self.undisturbed)
        left = sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())
        assert left == [f"step-{STEPS:08d}"]


def kill_at_every_operation(run: Run, rank: int) -> list[str]:
    """Kills a rank at each operation of a save, and returns the operations."""
    names = []
    for number in itertools.count(1):
        before = run.newest_step()
        codes, name = run.launch(kill_at_operation, rank=rank, number=number)
        if codes == [0, 0]:
            assert before < STEPS - 1, "the run was too short for all operations"
            return names
        assert codes[rank] == -signal.SIGKILL
        assert run.newest_step() in (before, before + 1), f"killed at {name}"
        names.append(name)
    raise AssertionError("unreachable")


def assert_is_a_save(names: list[str], rank: int) -> None:
    """The hook has missed none of the operations that a save cannot do without."""
    own = f"rank-{rank:05d}.safetensors"
    wanted = [f"create {own}", f"fsync {own}"]
    if rank == 0:
        wanted += ["os.mkdir .step-", "fsync manifest.json", "fsync .step-", "os.rename .step-", "fsync checkpoints"]
        wanted += ["os.remove rank-00001.safetensors", "os.rmdir"]
    for want in wanted:
        assert any(name.startswith(want) for name in names), (want, names)


@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_killed_at_every_operation_of_a_save(rank: int, tmp_path: Path, stores: list[Path]) -> None:
    run = Run(tmp_path, stores, zero_stage=2)
    assert_is_a_save(kill_at_every_operation(run, rank), rank)
    assert_exact(run.run_dir, run.undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_killed_at_every_operation_of_a_save_at_other_stages(
    zero_stage: int, rank: int, tmp_path: Path, stores: list[Path]
) -> None:
    run = Run(tmp_path, stores, zero_stage=zero_stage)
    assert_is_a_save(kill_at_every_operation(run, rank), rank)
    assert_exact(run.run_dir, run.undisturbed)


@pytest.mark.parametrize("stall_seconds", [2, pytest.param(8, marks=pytest.mark.faults)])
def test_a_rank_that_dies_in_its_shard_leaves_the_checkpoint_before(
    stall_seconds: float, tmp_path: Path, stores: list[Path]
) -> None:
    run = Run(tmp_path, stores, zero_stage=2)
    before = run.newest_step()
    codes, _ = run.launch(die_in_shard, rank=1, after_seconds=stall_seconds)
    assert codes[1] == -signal.SIGKILL
    assert run.newest_step() == before
    for rank in range(NUM_RANKS):
        codes, _ = run.launch(die_in_file, rank=rank, at_byte=20_000)
        assert codes[rank] == -signal.SIGXFSZ
        if rank == 0:  # which removes what another rank has left, if it comes to that
            (torn,) = (run.run_dir / "checkpoints").glob(".step-*.tmp/rank-00000.safetensors")
            assert torn.stat().st_size == 20_000
        assert run.newest_step() == before
    run.finish()

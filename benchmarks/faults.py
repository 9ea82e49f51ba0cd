"""Kills pretraining runs at random moments, lets them go on, and compares each with one that nobody disturbed.

    spade-t5 bench faults [--kills 100] [--out docs/results]

Two ranks train `tiny` on a mixture of real text with dropout, accumulation, loader workers, packing, clipping, a cosine schedule and an
average of the weights, under ZeRO 1, 2 and 3, in fp32 and in bf16. A kill is a SIGKILL of one rank, of the launcher or of everything; half
of them are aimed into the writing of a checkpoint, which a slow `fsync` draws out. Whatever is not as it must be raises AssertionError.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spade_t5.benchmarks import report, script
from spade_t5.checkpoint import list_checkpoints
from spade_t5.errors import ConfigError
from spade_t5.pretrain.corpora import CorpusConfig, FilesCorpus, PydocsCorpus
from spade_t5.pretrain.prepare import PrepareConfig, prepare
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer
from spade_t5.testing.data import find_dev_data
from spade_t5.testing.ranks import RankGroup, launch_ranks
from spade_t5.testing.runs import assert_exact, attempts, write_recipe
from spade_t5.training.reporting import METRICS_FILE

KINDS: dict[str, int | Literal["launcher", "all"]] = {"rank 0": 0, "rank 1": 1, "launcher": "launcher", "all": "all"}
CONFIGURATIONS = tuple(itertools.product((1, 2, 3), ("fp32", "bf16")))
"""ZeRO stage and precision."""
NUM_RANKS = 2
STEPS = 16
SAVE_EVERY_STEPS = 4
FSYNC_SECONDS = 0.05
LARGEST_DELAY_SECONDS = 0.2
"""A kill aimed at a write comes so long at most after the folder of the write was seen; a write takes a few times FSYNC_SECONDS."""
POLL_SECONDS = 0.003
# Each with a package whose text is held out.
_DOCUMENTED = {
    "tools": ("json", "email", "logging", "argparse", "asyncio"),
    "others": ("http", "urllib", "xml", "ctypes", "importlib", "multiprocessing", "unittest", "pathlib", "mailbox"),
}


class Aim(NamedTuple):
    """What is killed, and when."""

    kind: str
    is_at_write: bool
    """While a checkpoint is written, if the moment is met; else at any moment since the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill and what it cost."""

    zero_stage: int
    precision: str
    kind: str
    written_step: int | None
    """Step of the checkpoint that was being written, and was not published; None: the kill was inside no write."""
    last_step: int
    """Last step that was made, 0 for none."""
    kept_step: int
    """Step of the newest checkpoint, 0 for none."""
    gone_seconds: float
    """From the kill until no process was left, loader workers included."""

    @property
    def lost_steps(self) -> int:
        """Steps to make again."""
        return self.last_step - self.kept_step

    def check(self) -> None:
        """Asserts that at most one save interval is lost, counted up to the step whose checkpoint was begun last."""
        begun_step = self.last_step - self.last_step % SAVE_EVERY_STEPS
        assert begun_step - self.kept_step <= SAVE_EVERY_STEPS, f"too much is lost: {self}"


@dataclass(kw_only=True, slots=True)
class _Launch:
    """A group of ranks at work on a run."""

    group: RankGroup
    metrics: Path
    num_metrics_bytes: int
    """Of earlier launches."""
    started: float
    """On the clock of file systems: what has changed since is no leftover of an earlier launch."""
    first_step_seconds: float | None = None
    """From the start of the processes, which have everything imported, to the first step that they made."""

    def watch(self, is_enough: Callable[[], bool]) -> None:
        """Returns when it is enough, or when the group has ended."""
        while self.group.is_running() and not is_enough():
            if self.first_step_seconds is None and self.metrics.exists():
                with self.metrics.open("rb") as stream:
                    stream.seek(self.num_metrics_bytes)
                    if b'"train"' in stream.read():
                        self.first_step_seconds = time.monotonic() - self.group.started
            time.sleep(POLL_SECONDS)


@dataclass(kw_only=True)
class Campaign:
    """Kills of one configuration; every run is compared with the undisturbed one."""

    folder: Path
    """New folder for the runs."""
    stores: Sequence[Path]
    """Token stores."""
    zero_stage: int
    precision: str
    seed: int
    """Decides about moments."""
    kills: list[Kill] = field(default_factory=list)
    num_runs: int = 0
    """Runs that were killed and have then finished; a run that ends before all kills are made is followed by another."""
    num_redone_steps: int = 0
    restart_seconds: list[float] = field(default_factory=list)

    def run(self, aims: Sequence[Aim]) -> None:
        """Makes the undisturbed run, then the kills.

        Raises:
            AssertionError: something did not survive unharmed.
        """
        self.folder.mkdir()
        self._random = random.Random(f"{self.seed} {self.zero_stage} {self.precision}")
        self._recipe = write_recipe(
            self.folder / "recipe.yaml",
            self.stores,
            steps=STEPS,
            save_every_steps=SAVE_EVERY_STEPS,
            precision=self.precision,
            deepspeed={"zero_stage": self.zero_stage, "persistence_threshold_numel": 5000},
        )
        undisturbed = self.folder / "undisturbed"
        start_seconds, self._seconds = self._finish(undisturbed)
        assert start_seconds is not None, "a new run makes steps"
        self._start_seconds = start_seconds
        while len(self.kills) < len(aims):
            run_dir = self.folder / f"run-{self.num_runs}"
            is_finished = False
            while len(self.kills) < len(aims) and not is_finished:
                is_finished = self._kill(run_dir, aims[len(self.kills)])
            if not is_finished:
                restart_seconds, _ = self._finish(run_dir)
                if restart_seconds is not None:
                    self.restart_seconds.append(restart_seconds)
            assert_exact(run_dir, undisturbed)
            self.num_runs += 1
            self.num_redone_steps += len(attempts(run_dir)) - STEPS

    def _finish(self, run_dir: Path) -> tuple[float | None, float]:
        """Trains to the end; returns the seconds to the first step, if any was left to be made, and to the end."""
        launch = self._launch(run_dir)
        with launch.group as group:
            launch.watch(lambda: time.monotonic() - group.started > 300)
            _assert_finished(group)
        return launch.first_step_seconds, time.monotonic() - group.started

    def _launch(self, run_dir: Path) -> _Launch:
        metrics = run_dir / METRICS_FILE
        num_bytes = metrics.stat().st_size if metrics.exists() else 0
        number = len(list(self.folder.glob("logs-*")))
        started = time.time()
        group = launch_ranks(
            ["pretrain", str(self._recipe), f"run_dir={run_dir}"],
            num_ranks=NUM_RANKS,
            log_dir=self.folder / f"logs-{number}",
            hook=slow_disk,
            hook_arguments={"fsync_seconds": FSYNC_SECONDS},
        )
        return _Launch(group=group, metrics=metrics, num_metrics_bytes=num_bytes, started=started)

    def _kill(self, run_dir: Path, aim: Aim) -> bool:
        """Starts a run, or goes on with it, and kills it; returns whether it had ended before."""
        kept_before = _kept_step(run_dir)
        launch = self._launch(run_dir)
        with launch.group as group:
            moment = self._moment(STEPS - kept_before)
            if aim.is_at_write:
                number = self._random.randint(1, max(1, (STEPS - kept_before) // SAVE_EVERY_STEPS))
                self._watch_for_write(launch, run_dir, number)
                moment = time.monotonic() - group.started + self._random.uniform(0, LARGEST_DELAY_SECONDS)
            launch.watch(lambda: time.monotonic() - group.started >= moment)
            if not group.is_running():
                _assert_finished(group)
                return True
            at_write = set(_unfinished(run_dir, launch.started))
            killed_at = time.monotonic()
            group.kill(KINDS[aim.kind])
            if aim.kind in ("launcher", "all"):
                group.assert_gone(2)
            group.wait(30)
            group.assert_gone(2)
            gone_seconds = time.monotonic() - killed_at
        if launch.first_step_seconds is not None and kept_before:
            self.restart_seconds.append(launch.first_step_seconds)
        # The main rank removes what it was writing where it outlives another rank for a moment.
        at_write |= set(_unfinished(run_dir, launch.started))
        kept_step = _kept_step(run_dir)
        written = [step for name in at_write if (step := _step_of(name)) > kept_step]
        kill = Kill(
            zero_stage=self.zero_stage,
            precision=self.precision,
            kind=aim.kind,
            written_step=max(written, default=None),
            last_step=max([step for step, _ in attempts(run_dir)[-1:]], default=0),
            kept_step=kept_step,
            gone_seconds=gone_seconds,
        )
        assert kill.kept_step >= kept_before, f"checkpoint {kept_before} is gone: {kill}"
        kill.check()
        self.kills.append(kill)
        return False

    def _moment(self, num_steps: int) -> float:
        """Seconds after a start, so that the run hardly ever ends before."""
        training_seconds = (self._seconds - self._start_seconds) * num_steps / STEPS
        return self._random.uniform(0, self._start_seconds + 0.9 * training_seconds)

    def _watch_for_write(self, launch: _Launch, run_dir: Path, number: int) -> None:
        """Returns when so many checkpoints have begun to be written."""
        seen: set[str] = set()

        def is_enough() -> bool:
            seen.update(_unfinished(run_dir, launch.started))
            return len(seen) >= number

        launch.watch(is_enough)


def slow_disk(fsync_seconds: float) -> None:
    """A hook: makes every fsync take so much longer."""
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(fsync_seconds)
        fsync(descriptor)

    os.fsync = slow_fsync  # type: ignore[assignment]


def aims_of(configuration: int, num_kills: int) -> list[Aim]:
    """One configuration's share of a campaign: kinds of kills come equally often, and every second one is aimed at a write.

    Args:
        configuration: its place in CONFIGURATIONS.
        num_kills: of the whole campaign.
    """
    rounds = [number // len(CONFIGURATIONS) for number in range(configuration, num_kills, len(CONFIGURATIONS))]
    return [Aim(tuple(KINDS)[(3 * i + configuration) % len(KINDS)], (i + configuration) % 2 == 0) for i in rounds]


def run_campaign(folder: Path, stores: Sequence[Path], *, num_kills: int, seed: int) -> dict[str, Any]:
    """A campaign over all configurations.

    Args:
        folder: for the runs.
        stores: token stores to train on.
        num_kills: over all configurations.
        seed: decides about moments.

    Returns:
        its figures, as JSON values.

    Raises:
        AssertionError: something did not survive unharmed, or too few kills were inside a write.
    """
    campaigns = []
    for number, (zero_stage, precision) in enumerate(CONFIGURATIONS):
        campaign = Campaign(
            folder=folder / f"zero-{zero_stage}-{precision}",
            stores=stores,
            zero_stage=zero_stage,
            precision=precision,
            seed=seed,
        )
        campaign.run(aims_of(number, num_kills))
        campaigns.append(campaign)
        inside = sum(kill.written_step is not None for kill in campaign.kills)
        print(
            f"ZeRO {zero_stage}, {precision}: {len(campaign.kills)} kills, {inside} inside a write, {campaign.num_runs} runs, "
            f"{campaign.num_redone_steps} steps redone, all identical",
            flush=True,
        )
    kills = [kill for campaign in campaigns for kill in campaign.kills]
    num_inside = sum(kill.written_step is not None for kill in kills)
    assert num_inside * 4 >= num_kills, f"only {num_inside} of {num_kills} kills were inside a write"
    return {
        "num_kills": len(kills),
        "num_inside_write": num_inside,
        "by_kind": dict(Counter(kill.kind for kill in kills)),
        "num_runs_all_identical_to_undisturbed": sum(campaign.num_runs for campaign in campaigns),
        "steps_of_a_run": STEPS,
        "save_every_steps": SAVE_EVERY_STEPS,
        "fsync_delay_seconds": FSYNC_SECONDS,
        "num_redone_steps_all_identical": sum(campaign.num_redone_steps for campaign in campaigns),
        "lost_steps": _spread([kill.lost_steps for kill in kills]),
        "lost_steps_outside_writes": _spread([kill.lost_steps for kill in kills if kill.written_step is None]),
        "gone_seconds": _spread([kill.gone_seconds for kill in kills]),
        "restart_seconds": _spread([seconds for campaign in campaigns for seconds in campaign.restart_seconds]),
        "kills": [dataclasses.asdict(kill) for kill in kills],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--kills", type=int, default=100, help="over all configurations")
    parser.add_argument("--seed", type=int, default=0, help="decides about moments")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of faults.json")


def run(options: argparse.Namespace) -> None:
    """Runs a campaign, prints its figures and writes faults.json."""
    if options.kills < 1:
        raise ConfigError(f"--kills: {options.kills} must be at least 1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.monotonic()
        results = run_campaign(folder, make_stores(folder), num_kills=options.kills, seed=options.seed)
        results = {"seed": options.seed, "seconds": time.monotonic() - started, **results}
    for name, value in results.items():
        if name != "kills":
            print(f"{name}: {value}")
    print(report.write("faults", results, options.out))


def make_stores(folder: Path) -> list[Path]:
    """Two token stores with one tokenizer of 2,000 pieces: of web text and news where SPADE_T5_DEV_DATA has them, else of documentation."""
    data = find_dev_data()
    corpora: dict[str, CorpusConfig]
    if data:
        corpora = {
            name: FilesCorpus(paths=(str(data / "text" / f"{name}.jsonl.gz"),)) for name in ("c4_en", "wikinews")
        }
    else:
        corpora = {name: PydocsCorpus(packages=packages) for name, packages in _DOCUMENTED.items()}
    first = next(iter(corpora.values()))
    tokenizer = train_tokenizer(
        TokenizerConfig(
            corpus=first, out=folder / "tokenizer", vocab_size=2000, num_sentinels=64, sample_bytes=1_000_000
        )
    )
    stores = []
    for name, corpus in corpora.items():
        store = prepare(
            PrepareConfig(
                corpus=corpus,
                tokenizer=str(tokenizer),
                out=folder / name,
                held_out_fraction=0.02,
                max_documents=300 if data else None,
                num_processes=1,
            )
        )
        assert store is not None, "this process prepares everything"
        stores.append(store)
    return stores


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "max": max(values)} if values else None


def _assert_finished(group: RankGroup) -> None:
    codes = group.wait(30)
    assert codes == [0] * NUM_RANKS, f"exit codes {codes}\n{group.errors()}"
    group.assert_gone(2)


def _unfinished(run_dir: Path, since: float) -> list[str]:
    """Folders of unfinished checkpoints that were made or changed since."""
    found = []
    for path in (run_dir / "checkpoints").glob(".step-*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ctime >= since:
                found.append(path.name)
    return found


def _step_of(unfinished: str) -> int:
    return int(unfinished.removeprefix(".step-").removesuffix(".tmp"))


def _kept_step(run_dir: Path) -> int:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

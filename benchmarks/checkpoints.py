"""What saving costs: training with saves beside training without, and save and load beside the bare disk.

    spade-t5 bench checkpoints [--out docs/results] [--folder DISK] [--steps 200] [--saves 4]

Two copies of the same training take turns, a save interval at a time, so that what disturbs the machine disturbs them alike. One of them
saves: training waits for the copy in memory, the rest is written behind the next steps, and what is left of that at the end of a turn is
waited for and counted. The disk is measured by the same bytes: written and forced to disk, dropped from memory, and read. Rows are random
tokens, of 512 inputs and 114 targets: no part of a step depends on their values.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.benchmarks import report, script
from spade_t5.checkpoint import (
    CheckpointSaver,
    Retention,
    SaveReport,
    load_checkpoint,
    take_snapshot,
    verify_checkpoint,
)
from spade_t5.errors import ConfigError
from spade_t5.hf.loading import build_model
from spade_t5.training import Seq2SeqObjective, TrainingConfig
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import SingleProcess

INPUT_TOKENS, TARGET_TOKENS = 512, 114
GOAL_RATIO = 1.02
PIECE_BYTES = 4 << 20


class Training:
    """Steps of AdamW in one process with an average of the weights, and saves."""

    def __init__(self, preset: str, batch_rows: int, folder: Path) -> None:
        """Builds the model; the same one each time.

        Args:
            preset: of the model.
            batch_rows: rows of a step.
            folder: for checkpoints.
        """
        torch.manual_seed(0)
        config = SpadeT5Config.from_preset(preset, dropout_rate=0.0)
        training = TrainingConfig(steps=1, global_batch_rows=batch_rows, micro_batch_rows=batch_rows)
        self.backend = SingleProcess(build_model(SpadeT5ForConditionalGeneration, config, seed=0), training)
        self.average = WeightAverage(self.backend.fragments(), 0.999)
        self.saver = CheckpointSaver(folder, Retention(keep_last=1))
        self._batch = {
            name: torch.randint(3, 32000, (batch_rows, length)).to(self.backend.device)
            for name, length in (("input_ids", INPUT_TOKENS), ("labels", TARGET_TOKENS))
        }
        self._objective = Seq2SeqObjective()
        self._step = 0

    def train(self, num_steps: int) -> None:
        """Makes steps."""
        self.backend.model.train()
        for _ in range(num_steps):
            loss = self._objective.loss_sums(self.backend.model, self._batch).whole
            self.backend.backward(loss / self._batch["labels"].numel())
            self.backend.step(1.0)
            self.average.update()
            self._step += 1

    def save(self) -> None:
        """Begins a save, which goes on behind the next steps."""
        self.saver.save(take_snapshot(self.backend, step=self._step, facts={}, average=self.average))


def compare(preset: str, *, batch_rows: int, steps: int, saves: int, folder: Path) -> dict[str, Any]:
    """Wall time of training with saves and of training without, in turns.

    Args:
        preset: of the model.
        batch_rows: rows of a step.
        steps: of each of the two.
        saves: how many, the last one behind the last step.
        folder: on the disk to write to.
    """
    saving = Training(preset, batch_rows, folder / "saving")
    plain = Training(preset, batch_rows, folder / "plain")
    for training in (saving, plain):
        training.train(2)  # warms up
    interval = steps // saves
    saving_seconds, plain_seconds, reports = [], [], []
    for turn in range(saves):
        for training in (saving, plain) if turn % 2 == 0 else (plain, saving):
            started = time.perf_counter()
            if training is plain:
                plain.train(interval)
                plain_seconds.append(time.perf_counter() - started)
                continue
            if turn > 0:
                saving.save()
            saving.train(interval)
            reports += [saving.saver.wait()]
            if turn == saves - 1:
                saving.save()
                reports += [saving.saver.wait()]
            saving_seconds.append(time.perf_counter() - started)
    saving.saver.close()
    plain.saver.close()
    return {
        "steps": interval * saves,
        "saves": saves,
        "with_saves_seconds": saving_seconds,
        "without_saves_seconds": plain_seconds,
        "ratio": sum(saving_seconds) / sum(plain_seconds),
        "goal_ratio": GOAL_RATIO,
        "reports": [_figures(found) for found in reports if found is not None],
    }


def rates(preset: str, *, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of saving and loading with nothing else going on, of the bare disk with as many bytes, and of hashing, in turns."""
    training = Training(preset, 1, folder / "alone")
    training.train(1)
    seconds: dict[str, list[float]] = {}
    reports: list[SaveReport] = []

    def timed(name: str, started: float) -> None:
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(rounds):
        training.train(1)
        started = time.perf_counter()
        training.save()
        saved = training.saver.wait()
        timed("save", started)
        assert saved is not None
        reports.append(saved)
        _forget(saved.path)
        started = time.perf_counter()
        load_checkpoint(saved.path, training.backend, average=training.average)
        timed("load", started)
        _forget(saved.path)
        started = time.perf_counter()
        load_checkpoint(saved.path, training.backend, average=training.average, is_verified=True)
        timed("load, already verified", started)
        started = time.perf_counter()
        verify_checkpoint(saved.path)
        timed("verify, in memory", started)
        started = time.perf_counter()
        _write_bare(folder / "bare", saved.num_bytes)
        timed("bare write and fsync", started)
        _forget(folder / "bare")
        started = time.perf_counter()
        _read_bare(folder / "bare")
        timed("bare read", started)
    training.saver.close()
    num_bytes = reports[0].num_bytes
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "num_bytes": num_bytes,
        "seconds": {name: report.summary(values) for name, values in seconds.items()},
        "gigabytes_per_second": {name: num_bytes / median / 1e9 for name, median in medians.items()},
        "save_over_bare_write": medians["save"] / medians["bare write and fsync"],
        "load_over_bare_read": medians["load"] / medians["bare read"],
        "reports": [_figures(found) for found in reports],
    }


def _figures(saved: SaveReport) -> dict[str, Any]:
    return {name: value for name, value in saved.as_json().items() if name != "path"}


def _write_bare(path: Path, num_bytes: int) -> None:
    piece = os.urandom(PIECE_BYTES)
    with path.open("wb", buffering=0) as stream:
        for start in range(0, num_bytes, PIECE_BYTES):
            stream.write(piece[: num_bytes - start])
        os.fsync(stream.fileno())


def _read_bare(path: Path) -> None:
    piece = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(piece):
            pass


def _forget(path: Path) -> None:
    """Asks the kernel to drop its copies of a file, or of the files of a folder, so that they are read from the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of checkpoints.json")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the temporary one")
    parser.add_argument("--preset", default="mini", help="model")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=200, help="steps of training, with saves and without")
    parser.add_argument("--saves", type=int, default=4, help="saves among them")
    parser.add_argument("--rounds", type=int, default=5, help="saves and loads with nothing else going on")


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print its figures, write checkpoints.json."""
    for name in ("batch_rows", "saves", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: {getattr(options, name)} must be at least 1")
    if options.steps < options.saves:
        raise ConfigError(f"--steps: {options.steps} must be at least the number of saves, {options.saves}")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        alone = rates(options.preset, rounds=options.rounds, folder=folder)
        training = compare(
            options.preset, batch_rows=options.batch_rows, steps=options.steps, saves=options.saves, folder=folder
        )
    print(f"{options.preset}: checkpoints of {alone['num_bytes'] / 1e6:,.0f} MB")
    print(
        f"{training['steps']} steps with {training['saves']} saves took {training['ratio']:.3f} times as long as without "
        f"(goal {GOAL_RATIO})"
    )
    for name in ("blocked", "write", "hash", "sync", "read_back"):
        values = [found[f"{name}_seconds"] for found in training["reports"]]
        print(
            f"{name.replace('_', ' ') + ' time of a save':28} {statistics.median(values):8.3f} s, at most {max(values):.3f} s"
        )
    for name, rate in alone["gigabytes_per_second"].items():
        print(f"{name:28} {rate:8.2f} GB/s")
    results = {"preset": options.preset, "batch_rows": options.batch_rows, "training": training, "alone": alone}
    print(report.write("checkpoints", results, options.out))


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

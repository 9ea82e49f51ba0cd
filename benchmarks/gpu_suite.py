"""Everything that needs a GPU, in one sitting of less than nine minutes: the tests marked `gpu`, then every op beside its peers.

    python -m spade_t5.benchmarks.gpu_suite --out runs/gpu [--tests tests]

Each part is a process with a time limit of its own and leaves its files as it goes (a log each, the tests' results as JUnit XML,
kernels.json and kernels.md after every case), so that a part that is cut off loses nothing that was finished. The kernels' own tests come first: no
speed without correctness. Without a GPU the marked tests skip themselves and the ops' CPU paths are measured. Exit code 1 if a part failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spade_t5.benchmarks import report, script

_GRACE_SECONDS = 45
"""From the end of what a part may start to its end by force."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command with a time limit."""

    name: str
    command: list[str]
    limit_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended; `exit_code` is None if it was cut off."""

    name: str
    exit_code: int | None
    seconds: float
    limit_seconds: float


def parts(out: Path, tests: Path) -> list[Part]:
    """The parts in the order of their importance."""
    marked = files_with_gpu_tests(tests)
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    found = []
    for name, chosen, limit_seconds in (
        ("kernel-tests", [path for path in marked if "kernels" in path.parts], 120.0),
        ("other-tests", [path for path in marked if "kernels" not in path.parts], 130.0),
    ):
        if chosen:
            command = [*pytest, f"--junit-xml={out / name}.xml", *map(str, chosen)]
            found.append(Part(name=name, command=command, limit_seconds=limit_seconds))
    bench = [sys.executable, "-m", "spade_t5.benchmarks.kernels.command", "--out", str(out)]
    limit_seconds = 280.0
    bench.append(f"--time-limit={limit_seconds - _GRACE_SECONDS}")
    # The tests have proven the ops; the benchmark checks them once more, and so can stand between the two groups.
    found.insert(1, Part(name="kernels", command=bench, limit_seconds=limit_seconds))
    return found


def files_with_gpu_tests(tests: Path) -> list[Path]:
    """Test files that hold the marker, so that no other file need be importable where only the kernels' packages are."""
    return [path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_part(part: Part, log: Path) -> Outcome:
    """Run a part with its output in a log; it and its children are ended when its time is up."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            exit_code: int | None = process.wait(timeout=part.limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            exit_code = None
    return Outcome(
        name=part.name,
        exit_code=exit_code,
        seconds=time.monotonic() - started,
        limit_seconds=part.limit_seconds,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--tests", type=Path, default=Path("tests"), help="folder of the tests (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Run all parts, print how they ended, write gpu_suite.json."""
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here: the tests for one skip themselves, and the CPU paths are measured")
    if not options.tests.is_dir():
        print(f"{options.tests} is not a folder: no tests are run; start this in a checkout, or give --tests")
    outcomes: list[dict[str, Any]] = []
    for part in parts(out, options.tests):
        log = out / f"{part.name}.log"
        print(f"{part.name}: at most {part.limit_seconds:.0f} s, log in {log}", flush=True)
        outcome = run_part(part, log)
        outcomes.append(asdict(outcome))
        ending = "cut off" if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        last_line = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        print(f"{part.name}: {ending} after {outcome.seconds:.0f} s: {last_line}", flush=True)
        report.write("gpu_suite", {"has_gpu": torch.cuda.is_available(), "parts": outcomes}, out)
    if any(outcome["exit_code"] != 0 for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

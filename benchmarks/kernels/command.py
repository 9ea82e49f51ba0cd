"""Every op of the model beside its peers: correctness first, then time, rates and memory, forward and backward.

    spade-t5 bench kernels --out docs/results [--op local_attention] [--quick]
    spade-t5 bench kernels --tune [--op local_attention]

On a GPU the Triton kernels are measured, elsewhere the PyTorch paths. Writes kernels.json and kernels.md after every case, and
a plot an op at the end. An op that differs from its reference in float64 stops the run before anything is timed (exit code 1).
--tune measures launch configurations on a GPU and rewrites the tables beside the kernels.
"""

import argparse
import sys
from pathlib import Path

import torch

from spade_t5.benchmarks import report, script
from spade_t5.benchmarks.kernels.cases import plan_for
from spade_t5.benchmarks.kernels.correctness import RedCheckError
from spade_t5.benchmarks.kernels.goals import goal_rows
from spade_t5.benchmarks.kernels.registry import OPS
from spade_t5.benchmarks.kernels.results import CaseResult, Results
from spade_t5.benchmarks.kernels.runner import Runner
from spade_t5.benchmarks.kernels.table import markdown
from spade_t5.errors import ConfigError
from spade_t5.training.host_memory import keep_freed_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of kernels.json, .md and plots")
    parser.add_argument("--op", action="append", choices=OPS, help="op to measure; may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds on a CPU (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start nothing new after this time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds: to see that it runs")
    parser.add_argument("--tune", action="store_true", help="measure launch configurations instead, on a GPU")


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print the goals, write the files; or tune."""
    if options.rounds < 1:
        raise ConfigError(f"--rounds: {options.rounds} must be at least 1")
    ops = {name: OPS[name] for name in options.op or OPS}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if options.tune:
            _tune(list(ops), device)
            return
        if device == "cpu":
            keep_freed_memory()  # as the training engine does
        plan = plan_for(device, is_quick=options.quick)
        runner = Runner(plan, rounds=options.rounds, time_limit_seconds=options.time_limit)
        results = runner.run(ops, keep=lambda results, case: _keep(results, case, list(ops), options.out))
    except RedCheckError as error:
        sys.exit(f"spade-t5 bench kernels: a check is red, nothing was timed: {error}")
    goals = goal_rows(results, ops)
    for row in goals:
        print(f"{row['device']}  {row['op']:20} {row['goal']}: {row['measured']}, met: {row['met']}")
    print(options.out / "kernels.json", options.out / "kernels.md", *_plots(results, options.out), sep="\n")


def _plots(results: Results, out: Path) -> list[Path]:
    try:
        from spade_t5.benchmarks.kernels.plots import draw
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; run `pip install matplotlib`", file=sys.stderr)
        return []
    return draw(results, out)


def _keep(results: Results, case: CaseResult, ops: list[str], out: Path) -> None:
    for found in case.measurements:
        seconds = found.seconds("both") or found.seconds("forward")
        outcome = found.error if seconds is None else f"{1e3 * seconds:.3f} ms"
        print(f"{case.op}, {case.case}: {found.contender}: {outcome}", flush=True)
    goals = goal_rows(results, ops)
    report.write("kernels", {**results.to_json(), "goals": goals}, out)
    (out / "kernels.md").write_text(markdown(results, goals), encoding="utf-8")


def _tune(ops: list[str], device: str) -> None:
    if device != "cuda":
        raise ConfigError("--tune: launch configurations can only be measured on a GPU, and PyTorch sees none here")
    from spade_t5.benchmarks.kernels.tune import tune

    for op in ops:
        tune(op)


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

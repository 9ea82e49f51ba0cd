"""Plots of time against length with all contenders and the roofline; bars where there is one length only."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from spade_t5.benchmarks.kernels.cases import OURS
from spade_t5.benchmarks.kernels.results import CaseResult, Results
from spade_t5.benchmarks.kernels.table import significant

_PARTS = ("forward", "backward")


def draw(results: Results, out: Path) -> list[Path]:
    """Write kernels-OP.png for every op that was measured.

    Returns:
        the paths.
    """
    paths = []
    for op in dict.fromkeys(case.op for case in results.cases):
        groups = [results.group(op, group) for name, group in results.groups() if name == op]
        measured = {part for cases in groups for case in cases for found in case.measurements for part in found.times}
        parts = [part for part in _PARTS if part in measured]
        if not parts:
            continue
        figure, axes = pyplot.subplots(
            len(groups), len(parts), figsize=(4.5 * len(parts), 2.8 * len(groups)), squeeze=False, layout="constrained"
        )
        for row, cases in zip(axes, groups, strict=True):
            for axis, part in zip(row, parts, strict=True):
                (_lines if len(cases) > 1 else _bars)(axis, cases, part)
                axis.set_title(f"{cases[0].group}: {part}", fontsize=9)
                axis.tick_params(which="both", labelsize=8)
        path = out / f"kernels-{op}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _lines(axis: Axes, cases: list[CaseResult], part: str) -> None:
    contenders = dict.fromkeys(found.contender for case in cases for found in case.measurements)
    for contender in contenders:
        points = []
        for case in cases:
            found = case.of(contender)
            seconds = None if found is None else found.seconds(part)
            if seconds is not None:
                points.append((case.length, 1e3 * seconds))
        if points:
            width = 2.2 if contender == OURS else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=contender)
    least = [(case.length, 1e3 * case.least_seconds[part]) for case in cases]
    axis.plot(*zip(*least, strict=True), color="black", linestyle=":", linewidth=1, label="roofline")
    lengths = [case.length for case in cases]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("tokens a row (equally many tokens in all)", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.6)))
    axis.grid(visible=True, which="both", alpha=0.25)
    axis.legend(fontsize=7)


def _bars(axis: Axes, cases: list[CaseResult], part: str) -> None:
    (case,) = cases
    found = [(m.contender, m.seconds(part)) for m in case.measurements]
    known = [(name, 1e3 * seconds) for name, seconds in found if seconds is not None]
    if known:
        names, times = zip(*known, strict=True)
        bars = axis.barh(names, times, height=0.6)
        axis.bar_label(bars, [significant(time) for time in times], fontsize=8, padding=2)
        axis.margins(x=0.2)
    axis.axvline(1e3 * case.least_seconds[part], color="black", linestyle=":", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds (dotted: roofline)", fontsize=8)

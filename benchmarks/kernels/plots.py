"""Plots of time against length with all contenders and the roofline; bars where there is one length only."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from spade_t5.benchmarks.kernels.cases import OURS
from spade_t5.benchmarks.kernels.results import CaseResult, Results

_PARTS = ("forward", "backward")


def draw(results: Results, out: Path) -> list[Path]:
    """Write kernels-OP.png for every op that was measured.

    Returns:
        the paths.
    """
    paths = []
    for op in dict.fromkeys(case.op for case in results.cases):
        groups = [group for name, group in results.groups() if name == op]
        figure, axes = pyplot.subplots(
            len(groups), 2, figsize=(9.0, 2.8 * len(groups)), squeeze=False, layout="constrained"
        )
        for row, group in zip(axes, groups, strict=True):
            cases = results.group(op, group)
            for axis, part in zip(row, _PARTS, strict=True):
                if not any(part in found.times for case in cases for found in case.measurements):
                    axis.set_visible(False)
                    continue
                (_lines if len(cases) > 1 else _bars)(axis, cases, part)
                axis.set_title(f"{group}: {part}", fontsize=9)
                axis.tick_params(labelsize=8)
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
    axis.grid(visible=True, which="both", alpha=0.25)
    axis.legend(fontsize=7)


def _bars(axis: Axes, cases: list[CaseResult], part: str) -> None:
    (case,) = cases
    found = [(m.contender, m.seconds(part)) for m in case.measurements]
    known = [(name, 1e3 * seconds) for name, seconds in found if seconds is not None]
    if known:
        names, times = zip(*known, strict=True)
        bars = axis.barh(names, times, height=0.6)
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.margins(x=0.15)
    axis.axvline(1e3 * case.least_seconds[part], color="black", linestyle=":", linewidth=1, label="roofline")
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds", fontsize=8)
    axis.legend(fontsize=7, loc="lower right")

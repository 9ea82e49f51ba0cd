"""Pictures of a run, drawn from its metrics.jsonl at its end."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spade_t5.training.reporting import read_metrics

logger = logging.getLogger("spade_t5")

Lines = Sequence[dict[str, Any]]


def draw_plots(run_dir: Path) -> list[Path]:
    """Draws `plots/loss.png` and `plots/throughput.png`; returns those that were written: none where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("matplotlib is not installed: no curves are drawn")
        return []
    metrics = read_metrics(run_dir)
    drawn = [
        _draw(Figure(figsize=(7, 4), layout="constrained"), run_dir / "plots" / f"{name}.png", metrics, draw)
        for name, draw in (("loss", _draw_loss), ("throughput", _draw_throughput))
    ]
    return [path for path in drawn if path is not None]


def _draw(figure: Any, path: Path, metrics: Lines, draw: Callable[[Any, Lines], None]) -> Path | None:
    draw(figure, metrics)
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        logger.warning("%s: cannot be written (%s): no curve is drawn", path, error.strerror)
        return None
    return path


def _draw_loss(figure: Any, metrics: Lines) -> None:
    """Training and held-out loss over the steps."""
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per target)")
    for split, style in (("train", "-"), ("validation", "o-")):
        points = [(m["step"], m["loss"]) for m in metrics if m["split"] == split and m["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=split, linewidth=1, markersize=3)
            axes.legend()
    axes.grid(alpha=0.3)


def _draw_throughput(figure: Any, metrics: Lines) -> None:
    """Tokens in a second above, and below the parts of the time, over the steps."""
    rates, parts = figure.subplots(2, sharex=True)
    lines = [m for m in metrics if m["split"] == "train" and "seconds_by" in m]
    steps = [m["step"] for m in lines]
    rates.plot(steps, [m["tokens_per_second"] for m in lines], linewidth=1)
    rates.set(ylabel="input tokens/s", ylim=(0, None))
    if any(m["mfu"] is not None for m in lines):
        shares = rates.twinx()
        shares.plot(steps, [math.nan if m["mfu"] is None else 100 * m["mfu"] for m in lines], "C1", linewidth=1)
        shares.set(ylabel="MFU (%)", ylim=(0, None))
    names = list(lines[-1]["seconds_by"]) if lines else []
    totals = [sum(m["seconds_by"].values()) for m in lines]
    heights = [
        [100 * m["seconds_by"].get(name, 0.0) / total for m, total in zip(lines, totals, strict=True)] for name in names
    ]
    if names:
        parts.stackplot(steps, heights, labels=names, step="mid")
        parts.legend(fontsize=6, ncols=4, loc="lower left")
    parts.set(xlabel="step", ylabel="time (%)")

"""The results as Markdown: goals, then one table an op."""

from typing import Any

from spade_t5.benchmarks import report
from spade_t5.benchmarks.kernels.cases import OURS
from spade_t5.benchmarks.kernels.measure import PARTS
from spade_t5.benchmarks.kernels.results import CaseResult, Measurement, Results


def markdown(results: Results, goals: list[dict[str, Any]]) -> str:
    """The whole file."""
    found = report.circumstances()
    machine = found.get("gpu") or f"{found['processor']}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
    plan, ceilings = results.plan, results.ceilings
    lines = [
        "# Kernels",
        "",
        f"{machine}; {found['date']}; torch {found['torch']}, triton {found['triton']}, transformers {found['transformers']}; "
        f"{str(plan.dtype).removeprefix('torch.')}; load average at the end {found['load_average_at_end'][0]:.1f}.",
        f"Ceilings of this run: copy {ceilings.bytes_per_second / 1e9:,.0f} GB/s, "
        f"matrix product {ceilings.flops_per_second / 1e12:,.2f} TFLOP/s. Times are medians (20th to 80th percentile); "
        "TFLOP/s count visible pairs only; GB/s count every input and output once; memory is the peak beyond the inputs.",
        "",
        "## Goals",
        "",
        "| device | op | goal | measured | met |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {row['device']} | {row['op']} | {row['goal']} | {row['measured']} | {row['met']} |" for row in goals]
    for op in dict.fromkeys(case.op for case in results.cases):
        lines += ["", f"## {op}", "", *_op_table([case for case in results.cases if case.op == op])]
    return "\n".join(lines) + "\n"


def significant(value: float) -> str:
    """Three digits, all of those before the point: 0.0123, 4.56, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _op_table(cases: list[CaseResult]) -> list[str]:
    lines = [
        "| case | contender | forward | backward | both | ours against it | TFLOP/s | GB/s | of roofline | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        for measurement in case.measurements:
            lines.append(f"| {case.case} | {measurement.contender} | {_cells(case, measurement)} |")
    return lines


def _cells(case: CaseResult, measurement: Measurement) -> str:
    if not measurement.times:
        return f"{(measurement.error or '')[:120].replace('|', '/')}" + " |" * 7
    part = "both" if "both" in measurement.times else "forward"
    own, seconds = case.of(OURS), measurement.seconds(part)
    own_seconds = None if own is None else own.seconds(part)
    ratio = ""
    if measurement.contender != OURS and own_seconds is not None and seconds is not None:
        ratio = f"{seconds / own_seconds:.2f}x"
    rates = measurement.rates[part]
    cells = [
        *(_time(measurement.times.get(name)) for name in PARTS),
        ratio,
        f"{rates['flops_per_second'] / 1e12:.3g}" if rates["flops_per_second"] else "",
        f"{rates['bytes_per_second'] / 1e9:.3g}",
        f"{100 * rates['share_of_roofline']:.0f} %",
        "" if measurement.peak_bytes is None else f"{measurement.peak_bytes / 2**20:,.0f} MiB",
    ]
    return " | ".join(cells)


def _time(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    median, p20, p80 = (1e3 * times[f"{name}_seconds"] for name in ("median", "p20", "p80"))
    return f"{significant(median)} ms ({significant(p20)} to {significant(p80)})"

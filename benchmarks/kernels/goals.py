"""The speed goals: each with the value that this run measured, or "not measured"; nothing is estimated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spade_t5.benchmarks.kernels.cases import OURS
from spade_t5.benchmarks.kernels.results import CaseResult, Results

NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one number."""

    device: str
    op: str
    text: str
    measure: Callable[[Results], float | None]
    bound: float
    is_upper: bool
    unit: str

    def row(self, results: Results) -> dict[str, str | float | None]:
        """Goal, measured value and verdict, as they stand in the table."""
        is_measured = results.plan.device == self.device and not results.plan.is_quick
        value = self.measure(results) if is_measured else None
        sign = "<=" if self.is_upper else ">="
        row: dict[str, str | float | None] = {
            "device": "GPU" if self.device == "cuda" else "CPU",
            "op": self.op,
            "goal": f"{self.text} {sign} {self.bound:g}{self.unit}",
            "value": value,
        }
        if value is None:
            return {**row, "measured": NOT_MEASURED, "met": NOT_MEASURED}
        is_met = value <= self.bound if self.is_upper else value >= self.bound
        return {**row, "measured": f"{value:.3g}{self.unit}", "met": "yes" if is_met else "no"}


def goal_rows(results: Results, ops: Iterable[str]) -> list[dict[str, str | float | None]]:
    """All goals of the ops."""
    chosen = set(ops)
    return [goal.row(results) for goal in GOALS if goal.op in chosen]


def _cases(results: Results, op: str, group: str, length: int | None = None) -> list[CaseResult]:
    return [case for case in results.group(op, group) if length is None or case.length == length]


def _milliseconds(op: str, group: str, part: str, length: int | None = None) -> Callable[[Results], float | None]:
    """The longest time of ours over the lengths."""

    def value(results: Results) -> float | None:
        times = [_seconds(case, OURS, part) for case in _cases(results, op, group, length)]
        return None if not times or None in times else 1e3 * max(time for time in times if time is not None)

    return value


def _speedup(
    op: str, group: str, peer: str, parts: tuple[str, ...], length: int | None = None
) -> Callable[[Results], float | None]:
    """How many times faster than a peer we are: the least over lengths and parts."""

    def value(results: Results) -> float | None:
        ratios = []
        for case in _cases(results, op, group, length):
            for part in parts:
                own, other = _seconds(case, OURS, part), _seconds(case, peer, part)
                if own is None or other is None:
                    return None
                ratios.append(other / own)
        return min(ratios) if ratios else None

    return value


def _peak_ratio(op: str, group: str, peer: str, length: int) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        for case in _cases(results, op, group, length):
            own, other = case.of(), case.of(peer)
            if own is not None and other is not None and own.peak_bytes is not None and other.peak_bytes:
                return own.peak_bytes / other.peak_bytes
        return None

    return value


def _packed_ratio(results: Results) -> float | None:
    """Time of packed rows over that of unpacked ones, the worst length."""
    ratios = []
    for packed in _cases(results, "local_attention", "window 127, packed"):
        for unpacked in _cases(results, "local_attention", "window 127", packed.length):
            first, second = _seconds(packed, OURS, "both"), _seconds(unpacked, OURS, "both")
            if first is None or second is None:
                return None
            ratios.append(first / second)
    return max(ratios) if ratios else None


def _spread(op: str, group: str) -> Callable[[Results], float | None]:
    """Longest over shortest time of equally many tokens, forward and backward, over the lengths."""

    def value(results: Results) -> float | None:
        times = [_seconds(case, OURS, "both") for case in _cases(results, op, group)]
        known = [time for time in times if time is not None]
        return max(known) / min(known) if len(known) > 1 and len(known) == len(times) else None

    return value


def _bandwidth(op: str, group: str) -> Callable[[Results], float | None]:
    """Bytes a second against those of a copy, the slower pass."""

    def value(results: Results) -> float | None:
        shares = []
        for case in _cases(results, op, group):
            own = case.of()
            if own is None or "backward" not in own.rates:
                return None
            shares += [
                own.rates[part]["bytes_per_second"] / results.ceilings.bytes_per_second
                for part in ("forward", "backward")
            ]
        return min(shares) if shares else None

    return value


def _seconds(case: CaseResult, contender: str, part: str) -> float | None:
    measurement = case.of(contender)
    return None if measurement is None else measurement.seconds(part)


def _goal(
    device: str,
    op: str,
    text: str,
    measure: Callable[[Results], float | None],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    unit: str = "x",
) -> Goal:
    bound = at_most if at_most is not None else at_least
    assert bound is not None
    return Goal(device=device, op=op, text=text, measure=measure, bound=bound, is_upper=at_most is not None, unit=unit)


_ATTENTION, _CONV, _NORM, _GELU = "local_attention", "ssm_conv", "rms_norm", "gated_gelu"
_WINDOW = "window 127"

GOALS: tuple[Goal, ...] = (
    _goal(
        "cuda",
        _ATTENTION,
        "r = 127, 4,096 tokens a row, forward",
        _milliseconds(_ATTENTION, _WINDOW, "forward", 4096),
        at_most=0.25,
        unit=" ms",
    ),
    _goal(
        "cuda",
        _ATTENTION,
        "r = 127, 4,096 tokens a row, backward",
        _milliseconds(_ATTENTION, _WINDOW, "backward", 4096),
        at_most=0.65,
        unit=" ms",
    ),
    _goal(
        "cuda",
        _ATTENTION,
        "r = 127, 4,096 tokens a row, forward against FlexAttention",
        _speedup(_ATTENTION, _WINDOW, "flex", ("forward",), 4096),
        at_least=1.5,
    ),
    _goal(
        "cuda",
        _ATTENTION,
        "r = 127, 4,096 tokens a row, backward against FlexAttention",
        _speedup(_ATTENTION, _WINDOW, "flex", ("backward",), 4096),
        at_least=2.5,
    ),
    _goal("cuda", _ATTENTION, "r = 127, packed 256-token documents, time over unpacked", _packed_ratio, at_most=1.0),
    _goal(
        "cuda",
        _ATTENTION,
        "full 512 x 512 with bias, forward against SDPA",
        _speedup(_ATTENTION, "full", "sdpa-dense", ("forward",)),
        at_least=1.0,
    ),
    _goal(
        "cuda",
        _ATTENTION,
        "full 512 x 512 with bias, backward against SDPA",
        _speedup(_ATTENTION, "full", "sdpa-dense", ("backward",)),
        at_least=1.3,
    ),
    _goal(
        "cuda",
        _CONV,
        "S4 frozen, every length, forward",
        _milliseconds(_CONV, "S4 frozen", "forward"),
        at_most=0.3,
        unit=" ms",
    ),
    _goal(
        "cuda",
        _CONV,
        "S4 frozen, every length, backward to the input",
        _milliseconds(_CONV, "S4 frozen", "backward"),
        at_most=0.6,
        unit=" ms",
    ),
    _goal(
        "cuda",
        _CONV,
        "S4 frozen, 512 to 64k tokens a row, longest over shortest time",
        _spread(_CONV, "S4 frozen"),
        at_most=1.3,
    ),
    _goal(
        "cuda",
        _CONV,
        "S4 frozen, 4,096 tokens a row, both passes against torch FFT",
        _speedup(_CONV, "S4 frozen", "torch-fft", ("both",), 4096),
        at_least=4.0,
    ),
    _goal(
        "cuda", _NORM, "residual norm, share of copy bandwidth", _bandwidth(_NORM, "residual"), at_least=0.85, unit=""
    ),
    _goal(
        "cuda",
        _NORM,
        "residual norm, each pass against inductor",
        _speedup(_NORM, "residual", "inductor", ("forward", "backward")),
        at_least=1.0,
    ),
    _goal(
        "cuda", _GELU, "gated GELU, share of copy bandwidth", _bandwidth(_GELU, "gated gelu"), at_least=0.85, unit=""
    ),
    _goal(
        "cuda",
        _GELU,
        "gated GELU, each pass against inductor",
        _speedup(_GELU, "gated gelu", "inductor", ("forward", "backward")),
        at_least=1.0,
    ),
    _goal(
        "cpu",
        _ATTENTION,
        "r = 127, (1, 4096, 8, 64), forward against LongT5",
        _speedup(_ATTENTION, _WINDOW, "longt5", ("forward",), 4096),
        at_least=1.1,
    ),
    _goal(
        "cpu",
        _ATTENTION,
        "r = 127, (1, 4096, 8, 64), forward and backward against LongT5",
        _speedup(_ATTENTION, _WINDOW, "longt5", ("both",), 4096),
        at_least=1.0,
    ),
    _goal(
        "cpu",
        _ATTENTION,
        "r = 127, (1, 4096, 8, 64), peak memory over LongT5's",
        _peak_ratio(_ATTENTION, _WINDOW, "longt5", 4096),
        at_most=0.7,
    ),
    _goal(
        "cpu",
        "ssm_kernel",
        "LegS, 4,096 lags, against the Cauchy form",
        _speedup("ssm_kernel", "kernel of S4", "cauchy", ("forward",)),
        at_least=5.0,
    ),
    _goal(
        "cpu",
        "ssm_kernel",
        "S4D, 4,096 lags, against the full Vandermonde matrix",
        _speedup("ssm_kernel", "kernel of S4D", "vandermonde", ("forward",)),
        at_least=10.0,
    ),
)

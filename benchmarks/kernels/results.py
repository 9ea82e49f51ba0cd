"""What a run has measured, as it goes into the JSON file, the table, the plots and the goals."""

from dataclasses import asdict, dataclass, field
from typing import Any

from spade_t5.benchmarks.kernels.cases import OURS, Plan
from spade_t5.benchmarks.kernels.ceilings import Ceilings


@dataclass(kw_only=True)
class Measurement:
    """One contender on one case; an error, if there is one, says why there is no time."""

    contender: str
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    """Part to median, p20 and p80 in seconds."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Part to useful FLOP and bytes a second and the share of the roofline."""
    peak_bytes: int | None = None
    error: str | None = None

    def seconds(self, part: str) -> float | None:
        """Median of a part, None where it was not measured."""
        return self.times.get(part, {}).get("median_seconds")


@dataclass(kw_only=True)
class CaseResult:
    """All contenders of one case."""

    op: str
    case: str
    group: str
    length: int
    shape: dict[str, Any]
    least_seconds: dict[str, float]
    """Part to the time at the roofline."""
    measurements: list[Measurement] = field(default_factory=list)

    def of(self, contender: str = OURS) -> Measurement | None:
        """The measurement of a contender, None where it did not take part."""
        return next((found for found in self.measurements if found.contender == contender), None)


@dataclass(kw_only=True)
class Results:
    """A whole run, as far as it has come."""

    plan: Plan
    ceilings: Ceilings
    checks: list[dict[str, Any]]
    cases: list[CaseResult] = field(default_factory=list)

    def group(self, op: str, group: str) -> list[CaseResult]:
        """The cases that differ in length alone, shortest first."""
        found = [case for case in self.cases if (case.op, case.group) == (op, group)]
        return sorted(found, key=lambda case: case.length)

    def groups(self) -> list[tuple[str, str]]:
        """Op and group of all cases, in the order of measurement."""
        return list(dict.fromkeys((case.op, case.group) for case in self.cases))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        plan = {**asdict(self.plan), "dtype": str(self.plan.dtype).removeprefix("torch.")}
        return {
            "plan": plan,
            "ceilings": asdict(self.ceilings),
            "checks": self.checks,
            "cases": [asdict(case) for case in self.cases],
        }

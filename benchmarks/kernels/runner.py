"""Measures all cases of the chosen ops, one after the other, and hands the results on after each."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from spade_t5.benchmarks.kernels import correctness, measure
from spade_t5.benchmarks.kernels.cases import OURS, Benchmark, Case, Plan, Workload, plan_for
from spade_t5.benchmarks.kernels.ceilings import measure_ceilings
from spade_t5.benchmarks.kernels.registry import OPS, build_workload
from spade_t5.benchmarks.kernels.results import CaseResult, Measurement, Results

_GPU_SECONDS = 0.4
"""Time given to the rounds of one contender on one case."""


class Runner:
    """One run.

    Args:
        plan: sizes.
        rounds: of each contender on a CPU; a quick plan makes two.
        time_limit_seconds: contenders that would start after this are left out and recorded as such; None: no limit.
    """

    def __init__(self, plan: Plan, *, rounds: int = 7, time_limit_seconds: float | None = None) -> None:
        self.plan = plan
        self.rounds = 2 if plan.is_quick else rounds
        self._end = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds

    def run(self, ops: dict[str, Benchmark], *, keep: Callable[[Results, CaseResult], None]) -> Results:
        """Check, then measure.

        Args:
            ops: name to benchmark.
            keep: called with all results so far whenever a case has new ones.

        Raises:
            RedCheckError: an op is wrong; nothing was timed.
        """
        checks = correctness.run_checks(self.plan, ops)
        results = Results(plan=self.plan, ceilings=measure_ceilings(self.plan), checks=checks)
        cases = [(op, case) for op, benchmark in ops.items() for case in benchmark.cases(self.plan)]
        for op, case in cases:
            results.cases.append(self._new_result(op, case, results))
            self._measure(case, results.cases[-1], set(case.contenders) - set(case.compiled))
            self._rate(case, results.cases[-1])
            keep(results, results.cases[-1])
        for (_, case), result in _in_turns(list(zip(cases, results.cases, strict=True))):
            compiled = set(case.contenders) & set(case.compiled)
            if compiled:
                self._measure(case, result, compiled)
                self._rate(case, result)
                keep(results, result)
        return results

    def _new_result(self, op: str, case: Case, results: Results) -> CaseResult:
        least = {part: results.ceilings.least_seconds(case.work, part) for part in measure.PARTS}
        return CaseResult(
            op=op, case=case.name, group=case.group, length=case.length, shape=case.shape, least_seconds=least
        )

    def _measure(self, case: Case, result: CaseResult, names: set[str]) -> None:
        """Add the measurements of some contenders of a case."""
        chosen = {name: build for name, build in case.contenders.items() if name in names}
        if self.plan.device == "cuda":
            result.measurements += self._on_gpu(case, chosen)
        else:
            result.measurements += self._on_cpu(result.op, case, chosen)

    def _rate(self, case: Case, result: CaseResult) -> None:
        for measurement in result.measurements:
            for part in measurement.times:
                seconds, (flops, size_bytes) = measurement.times[part]["median_seconds"], case.work.of(part)
                measurement.rates[part] = {
                    "flops_per_second": flops / seconds,
                    "bytes_per_second": size_bytes / seconds,
                    "share_of_roofline": result.least_seconds[part] / seconds,
                }

    def _on_gpu(self, case: Case, contenders: dict[str, Callable[[], Workload]]) -> list[Measurement]:
        """One contender after the other, each with the memory to itself but for our outputs."""
        found = {name: Measurement(contender=name) for name in contenders}
        ours: tuple[torch.Tensor, ...] | None = None
        if OURS not in contenders:
            with suppress(Exception):  # was recorded when it was measured itself
                ours = _detached(case.contenders[OURS]().outputs())
        for name, build in contenders.items():
            torch._dynamo.reset()  # compiled peers of other shapes would count against its limit
            try:
                self._refuse_late()
                workload = build()
                outputs = _detached(workload.outputs())
                self._compare(case, name, outputs, ours)
                ours = outputs if name == OURS else ours
                del outputs
                found[name].times = measure.summary(measure.time_on_gpu(workload, seconds=_GPU_SECONDS))
                found[name].peak_bytes = measure.peak_bytes_on_gpu(workload)
                del workload
            except Exception as problem:  # a peer that fails is a result too
                found[name].error = _one_line(problem)
            gc.collect()
            torch.cuda.empty_cache()
        return list(found.values())

    def _on_cpu(self, op: str, case: Case, contenders: dict[str, Callable[[], Workload]]) -> list[Measurement]:
        """Contenders take turns; memory afterwards, each in a process of its own."""
        ours: tuple[torch.Tensor, ...] | None = None
        found = {name: Measurement(contender=name) for name in contenders}
        workloads: dict[str, Workload] = {}
        for name, build in contenders.items():
            try:
                self._refuse_late()
                workload = build()
                outputs = workload.outputs()  # the round that warms up
                self._compare(case, name, outputs, ours)
                ours = _detached(outputs) if name == OURS else ours
                workload.backward(outputs)
                workloads[name] = workload
                del outputs
            except Exception as problem:  # a peer that fails is a result too
                found[name].error = _one_line(problem)
        del ours
        rounds = self.rounds if case.max_rounds is None else min(self.rounds, case.max_rounds)
        for name, times in measure.time_on_cpu(workloads, rounds=rounds).items():
            found[name].times = measure.summary(times)
            arguments = (self.plan, op, case.name, name)
            try:
                found[name].peak_bytes = measure.peak_bytes_on_cpu(build_workload, warm_up, *arguments)
            except RuntimeError as problem:
                found[name].error = _one_line(problem)
        return list(found.values())

    def _compare(
        self, case: Case, name: str, outputs: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...] | None
    ) -> None:
        if ours is None or name in case.incomparable:
            return
        problem = correctness.why_incomparable(self.plan, outputs, ours)
        if problem is not None:
            raise ValueError(problem)

    def _refuse_late(self) -> None:
        if self._end is not None and time.monotonic() > self._end:
            raise TimeoutError("not measured: the time limit of the run was reached")


def warm_up(plan: Plan, op: str, case_name: str, contender: str) -> None:
    """Load what an op and its libraries load at first use, on small tensors."""
    small = plan_for(plan.device, is_quick=True)
    for case in OPS[op].cases(small):
        if contender in case.contenders:
            with suppress(Exception):  # the real workload will say what is wrong
                workload = case.contenders[contender]()
                workload.backward(workload.outputs())
            return


_CaseInRun = tuple[tuple[str, Case], CaseResult]


def _in_turns(cases: list[_CaseInRun]) -> list[_CaseInRun]:
    """The first case of every group, then the second of every group: the most important ones of all ops come first."""
    seen: dict[tuple[str, str], int] = {}
    turns = []
    for (op, case), result in cases:
        seen[op, case.group] = seen.get((op, case.group), -1) + 1
        turns.append((seen[op, case.group], ((op, case), result)))
    return [found for _, found in sorted(turns, key=lambda turn: turn[0])]


def _detached(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The values without the graph, which would keep memory."""
    return tuple(x.detach() for x in outputs)


def _one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}"

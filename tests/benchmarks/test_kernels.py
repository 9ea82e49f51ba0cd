"""`spade-t5 bench kernels`: files, goals, red checks, failing peers, time limit, tuning without a GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spade_t5.benchmarks.kernels import correctness, gated_gelu, goals, local_attention, measure, ssm_kernel
from spade_t5.benchmarks.kernels.cases import OURS, Benchmark, Plan, plan_for
from spade_t5.benchmarks.kernels.ceilings import Ceilings
from spade_t5.benchmarks.kernels.registry import OPS
from spade_t5.benchmarks.kernels.results import CaseResult, Measurement, Results
from spade_t5.benchmarks.kernels.runner import Runner
from spade_t5.launch.cli import main

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these are the CPU paths; a GPU measures other things"
)


@pytest.fixture
def plan() -> Plan:
    return plan_for("cpu", is_quick=True)


def test_writes_json_table_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--op={op}" for op in ("local_attention", "ssm_kernel")]
    assert main(["bench", "kernels", "--quick", "--out", str(tmp_path), *words]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {"circumstances", "plan", "ceilings", "checks", "cases", "goals"} <= set(found)
    assert {case["op"] for case in found["cases"]} == {"local_attention", "ssm_kernel"}
    for case in found["cases"]:
        assert case["measurements"][0]["contender"] == OURS
        for measurement in case["measurements"]:
            assert measurement["error"] is None
            # Kernels are generated without a backward pass.
            parts = {"forward"} if case["op"] == "ssm_kernel" else {"forward", "backward", "both"}
            assert set(measurement["times"]) == parts
            times = measurement["times"]["forward"]
            assert 0 < times["p20_seconds"] <= times["median_seconds"] <= times["p80_seconds"]
            assert measurement["rates"]["forward"]["share_of_roofline"] > 0
            assert measurement["peak_bytes"] is not None
    assert {goal["measured"] for goal in found["goals"]} == {goals.NOT_MEASURED}

    table = (tmp_path / "kernels.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert all(len(row) in (5, 10) for row in rows)
    assert "longt5" in table
    assert "cauchy" in table
    for op in ("local_attention", "ssm_kernel"):
        assert (tmp_path / f"kernels-{op}.png").read_bytes().startswith(b"\x89PNG")
    assert "longt5" in capsys.readouterr().out


def test_a_red_check_stops_all_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gated_gelu, "gated_gelu", lambda a, b: 1.001 * torch.nn.functional.gelu(a) * b)
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "kernels", "--quick", "--op", "gated_gelu", "--out", str(tmp_path)])
    message = str(exit_info.value.code)  # sys.exit prints a text and ends with code 1
    assert "gated_gelu, two halves: relative error" in message
    assert "nothing was timed" in message
    assert not list(tmp_path.iterdir())


def test_an_op_that_raises_is_red(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(a: Tensor, b: Tensor) -> Tensor:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(gated_gelu, "gated_gelu", broken)
    with pytest.raises(correctness.RedCheckError, match="gated_gelu, two halves: ZeroDivisionError: no"):
        correctness.run_checks(plan, {"gated_gelu": OPS["gated_gelu"]})


def test_all_checks_are_green(plan: Plan) -> None:
    assert {check["op"] for check in correctness.run_checks(plan, OPS)} == set(OPS)


def test_a_peer_that_fails_or_computes_something_else_is_recorded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_gelu, "gated_gelu_naive", lambda a, b: a * b)
    runner = Runner(plan)
    (case,) = gated_gelu.cases(plan)
    case.contenders["absent"] = lambda: __import__("no_such_package")
    ours, eager, absent = runner._on_cpu("gated_gelu", case, case.contenders)
    assert ours.error is None
    assert ours.seconds("both")
    assert "computes something else: outputs differ from ours" in str(eager.error)
    assert "No module named 'no_such_package'" in str(absent.error)
    assert not eager.times


def test_what_would_start_after_the_time_limit_is_left_out(plan: Plan) -> None:
    kept: list[Results] = []
    runner = Runner(plan, time_limit_seconds=0.0)
    results = runner.run({"gated_gelu": OPS["gated_gelu"]}, keep=lambda results, case: kept.append(results))
    assert kept == [results]
    assert all("time limit" in str(found.error) for case in results.cases for found in case.measurements)


def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--tune", "--op", "gated_gelu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tune: launch configurations can only be measured on a GPU" in line


class FakeEvent:
    """A CUDA event that measures by a counter: a millisecond between any two records."""

    now = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1
        self.time = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.time - self.time


def test_the_way_through_a_gpu_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control flow of a GPU run on a CPU: what it records, that compiled peers come last, and that failures stay alone."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(measure, "_FLUSH_BYTES", 10)
    monkeypatch.setattr(Runner, "_on_cpu", lambda self, op, case, contenders: self._on_gpu(case, contenders))
    cases = {op: list(OPS[op].cases(plan)) for op in ("local_attention", "gated_gelu")}
    for (case,) in (cases["local_attention"][:1], cases["gated_gelu"]):
        case.contenders["compiled"] = case.contenders["longt5" if "longt5" in case.contenders else "eager"]
        object.__setattr__(case, "compiled", ("compiled",))
    cases["gated_gelu"][0].contenders["absent"] = lambda: __import__("no_such_package")
    ops = {op: Benchmark(checks=OPS[op].checks, cases=lambda plan, op=op: iter(cases[op])) for op in cases}
    kept = []
    Runner(plan).run(ops, keep=lambda results, case: kept.append((case.op, len(case.measurements), len(results.cases))))
    num_cases = len(cases["local_attention"]) + 1
    assert [count for _, _, count in kept] == [*range(1, num_cases + 1), num_cases, num_cases]
    assert kept[-2:] == [("local_attention", 4, num_cases), ("gated_gelu", 4, num_cases)]

    results = Runner(plan).run(ops, keep=lambda results, case: None)
    for case in results.cases:
        for found in case.measurements:
            if found.contender == "absent":
                assert "No module named" in str(found.error)
                continue
            assert found.error is None
            assert found.peak_bytes == 250
            assert found.times["forward"]["median_seconds"] == pytest.approx(1e-3)
            assert found.times["both"]["median_seconds"] == pytest.approx(2e-3)


def test_a_gpu_run_asks_every_peer() -> None:
    plan = plan_for("cuda", is_quick=False)
    peers = {name for op in OPS.values() for case in op.cases(plan) for name in case.contenders}
    assert peers >= {
        *("flex", "flex-frozen-bias", "sdpa-blocks", "sdpa-dense", "longt5", "longt5-compiled"),
        *("torch-fft", "plain-fft", "liger", "inductor", "eager", "logits", "cauchy", "vandermonde"),
    }
    lengths = {case.length for case in OPS["local_attention"].cases(plan)}
    assert lengths == {512, 4096, 16384, 65536}


def test_numbers_are_kept_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spade_t5.benchmarks.kernels.plots", None)
    assert main(["bench", "kernels", "--quick", "--op", "gated_gelu", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    assert "no plots" in capsys.readouterr().err


def test_goals_are_met_missed_or_not_measured() -> None:
    plan = plan_for("cpu", is_quick=False)

    def measured(contender: str, forward: float, backward: float, peak_bytes: int) -> Measurement:
        seconds = {"forward": forward, "backward": backward, "both": forward + backward}
        times = {part: {"median_seconds": value} for part, value in seconds.items()}
        return Measurement(contender=contender, times=times, peak_bytes=peak_bytes)

    case: dict[str, Any] = {"op": "local_attention", "group": "window 127", "shape": {}, "least_seconds": {}}
    results = Results(plan=plan, ceilings=Ceilings(bytes_per_second=1.0, flops_per_second=1.0), checks=[])
    results.cases = [
        CaseResult(**case, case="short", length=512, measurements=[measured(OURS, 9.0, 9.0, 9)]),
        CaseResult(
            **case,
            case="long",
            length=4096,
            measurements=[measured(OURS, 1.0, 3.0, 60), measured("longt5", 2.0, 1.0, 100)],
        ),
    ]
    rows = [row for row in goals.goal_rows(results, ["local_attention"]) if row["device"] == "CPU"]
    assert [(row["measured"], row["met"]) for row in rows] == [("2x", "yes"), ("0.75x", "no"), ("0.6x", "yes")]
    rows = [row for row in goals.goal_rows(results, OPS) if row["device"] == "GPU"]
    assert len(rows) > 10
    assert {row["met"] for row in rows} == {goals.NOT_MEASURED}


def test_useful_pairs_are_counted_by_the_mask(plan: Plan) -> None:
    for case in local_attention.cases(plan):
        shape = case.shape
        i = torch.arange(shape["length"])
        offsets = i - i[:, None]
        is_visible = torch.ones_like(offsets, dtype=torch.bool)
        if shape["left"] is not None:
            is_visible &= offsets >= -shape["left"]
        if shape["right"] is not None:
            is_visible &= offsets <= shape["right"]
        if shape["document_tokens"] is not None:
            document = i // shape["document_tokens"]
            is_visible &= document == document[:, None]
        pairs = shape["rows"] * int(is_visible.sum())
        assert case.work.forward_flops == 4 * pairs * shape["num_heads"] * shape["d_kv"]


def test_the_cauchy_form_in_complex64_gives_our_kernel(plan: Plan) -> None:
    ours, peer = (
        ssm_kernel._workload(plan, ssm_kernel.S4, make, 200, channels=3).forward()
        for make in (ssm_kernel._own, ssm_kernel._cauchy)
    )
    assert isinstance(ours, Tensor)
    assert isinstance(peer, Tensor)
    assert (ours - peer).norm() <= 1e-4 * ours.norm()


def test_flex_attention_is_given_the_same_problem(plan: Plan) -> None:
    """Uncompiled and without gradients, as FlexAttention has no backward pass on a CPU."""
    for case in local_attention.cases(plan):
        shape = local_attention._Shape(**case.shape)
        ours = local_attention._ours(plan, shape).outputs()
        workload = local_attention._flex(plan, shape, trains_bias=False, is_compiled=False)
        for leaf in workload.leaves:
            leaf.requires_grad_(False)
        assert correctness.why_incomparable(plan, workload.outputs(), ours) is None

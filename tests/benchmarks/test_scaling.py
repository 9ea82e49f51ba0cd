"""The scaling benchmark: its predictions, and one of its checks on a slow link between two hosts."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spade_t5.benchmarks import shaped_links
from spade_t5.benchmarks.shaped_links import Layout, Shape, compare
from spade_t5.launch.cli import main
from spade_t5.testing.hosts import why_no_hosts
from spade_t5.training.bandwidth import CollectiveTime


def needs_hosts() -> None:
    """Skips where there can be none."""
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)


def test_predictions_are_marked_and_say_what_they_assume(tmp_path: Path) -> None:
    words = ["--skip-check", "--between", "wire=1:50", "--mfu", "0.3", "--out", str(tmp_path)]
    assert main(["bench", "scaling", *words]) == 0
    written = json.loads((tmp_path / "scaling.json").read_text())
    predictions = written["predictions"]
    assert written["check"] is None
    assert predictions["source"] == "predicted"
    assert predictions["assumed"]["mfu"] == 0.3
    assert predictions["assumed"]["links_between_nodes"] == ["wire=1:50"]
    by_case = {
        (one["preset"], one["precision"], one["zero_stage"], one["is_hierarchical"], one["micro_batches"]): one[
            "efficiency"
        ]
        for one in predictions["curves"]
    }
    assert len(by_case) == 3 * 2 * 9
    assert predictions["nodes"] == [1, 2, 4, 8, 16, 32, 64]
    for efficiencies in by_case.values():
        assert len(efficiencies) == 7
        assert efficiencies == sorted(efficiencies, reverse=True)
        assert 0 < efficiencies[-1] < efficiencies[0] < 1
    slow_node = {key: efficiencies[1] for key, efficiencies in by_case.items()}
    for preset in ("base", "large", "xl"):
        accumulated = slow_node[preset, "bf16", 1, False, 4]
        assert accumulated > 2 * slow_node[preset, "bf16", 1, False, 1]
        assert accumulated > slow_node[preset, "bf16", 2, False, 4]
    assert slow_node["xl", "bf16", 3, True, 4] > slow_node["xl", "bf16", 3, False, 4]
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--between", "wire"], "--between: 'wire' has no name; give NAME=GB/s:microseconds"),
        (["--within", "fast"], "link: 'fast' is not GB/s:microseconds"),
        (["--mfu", "40"], "--mfu: 40.0 must lie between 0 and 1"),
        (["--gpu", "h1000"], "--gpu: h1000 is not known"),
    ],
)
def test_bad_assumptions_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "scaling", "--skip-check", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err.replace("'h1000'", "h1000")


def test_a_comparison_says_by_how_much_a_prediction_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks whose collectives and steps take times that are given, on hosts that are none."""
    asked: list[Any] = []

    class Hosts(list[None]):
        @contextlib.contextmanager
        def slowed(self, *, bytes_per_second: float, delay_seconds: float) -> Iterator[None]:
            asked.append((bytes_per_second, delay_seconds))
            yield
            asked.append("as before")

    class Ranks(contextlib.nullcontext["Ranks"]):
        def __init__(self, hosts: Hosts, layout: Layout, folder: Path) -> None:
            super().__init__(self)

        def collectives(self) -> list[CollectiveTime]:
            rate = asked[-1][0] if asked else 1e9
            return [
                CollectiveTime(name=name, backend="gloo", num_ranks=2, num_bytes=size, seconds=1e-4 + size / rate)
                for name in ("all_reduce", "all_gather", "reduce_scatter")
                for size in (1_000, 1_000_000, 8_000_000)
            ]

        def step_seconds(self, zero_stage: int) -> float:
            return 10.0 if asked else 0.5

    monkeypatch.setattr(shaped_links, "make_hosts", lambda folder, count: contextlib.nullcontext(Hosts([None] * count)))
    monkeypatch.setattr(shaped_links, "Ranks", Ranks)
    found = list(compare([Layout(2, 1)], [Shape(80, 5)], zero_stages=[1, 3]))
    assert asked == [(1e7, 0.005), "as before"]
    assert [one.zero_stage for one in found] == [1, 3]
    for one in found:
        assert one.measured_seconds == 10
        assert one.ratio == one.predicted.seconds / 10
        assert 0 < one.communication_share < 1
        assert one.links["all_reduce"].bytes_per_second == pytest.approx(1e7, rel=0.01)
    assert found[0].predicted.seconds != found[1].predicted.seconds


@pytest.mark.faults
def test_a_step_on_a_slow_link_takes_about_as_long_as_predicted() -> None:
    """So slow that the link decides; even on a busy machine the prediction is then within a factor."""
    needs_hosts()
    found = list(compare([Layout(2, 1)], [Shape(50)], zero_stages=[1, 3]))
    assert [one.zero_stage for one in found] == [1, 3]
    for one in found:
        assert one.links["all_reduce"].bytes_per_second == pytest.approx(50e6 / 8, rel=0.3)
        assert one.communication_share > 0.4
        assert 0.6 < one.ratio < 1.6


@pytest.mark.faults
def test_ranks_that_share_a_slow_link() -> None:
    """Four hosts, and two of two ranks, from the link that was measured between two."""
    needs_hosts()
    for one in compare([Layout(2, 1), Layout(4, 1), Layout(2, 2)], [Shape(200), Shape(50), Shape(50, 5)]):
        assert 0.5 < one.ratio < 2, one

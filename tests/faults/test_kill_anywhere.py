"""Pretraining killed at random moments ends exactly where undisturbed pretraining ends.

Twelve kills here; `make test-faults` makes a hundred, and records them in docs/results/faults.json.
"""

from pathlib import Path

from spade_t5.benchmarks.faults import KINDS, run_campaign

NUM_KILLS = 12


def test_twelve_kills_leave_no_trace(tmp_path: Path, stores: list[Path]) -> None:
    results = run_campaign(tmp_path, stores, num_kills=NUM_KILLS, seed=1)  # which compares every run
    assert results["num_kills"] == NUM_KILLS
    assert results["by_kind"].keys() == KINDS.keys()

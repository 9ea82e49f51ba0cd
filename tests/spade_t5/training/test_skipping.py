import pytest

from spade_t5.errors import RunAbortedError
from spade_t5.training.skipping import SkippedSteps


def test_a_run_ends_after_too_many_in_a_row() -> None:
    skipped = SkippedSteps(3)
    for step in (1, 2, 4, 5):
        skipped.add(step, "the loss is nan")
    with pytest.raises(RunAbortedError, match="3 steps in a row were skipped up to step 6: the loss is inf"):
        skipped.add(6, "the loss is inf")


def test_a_run_ends_after_too_many_of_the_last_thousand() -> None:
    skipped = SkippedSteps(3)
    for i in range(40):  # ten of any thousand
        skipped.add(1 + 100 * i, "the loss is nan")
    assert skipped.steps == [3001 + 100 * i for i in range(10)]
    with pytest.raises(RunAbortedError, match="11 of the last 1000 steps were skipped up to step 3990"):
        skipped.add(3990, "the loss is nan")


def test_the_count_goes_on_from_a_checkpoint() -> None:
    with pytest.raises(RunAbortedError, match="2 steps in a row"):
        SkippedSteps(2, [8]).add(9, "the loss is nan")
    SkippedSteps(2, [7]).add(9, "the loss is nan")

"""Order of segment ids: what is accepted, and what is refused by name."""

import pytest
import torch

from spade_t5.kernels.segments import check_segment_ids, check_segment_order


def test_padding_may_stand_anywhere_and_numbers_may_be_left_out() -> None:
    check_segment_order(torch.tensor([[0, 0, 1, 0, 1, 4, 0, 9], [0] * 8, [7] * 8]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 1], [2, 1]], r"labels_ids decrease within a row; number"),
        ([[2, 0, 1]], r"labels_ids decrease within a row; number"),
        ([[1, -3]], r"labels_ids holds -3; number"),
    ],
)
def test_wrong_values_are_refused(ids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segment_order(torch.tensor(ids), "labels_ids")


def test_every_op_checks_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"segment_ids decrease"):
        check_segment_ids(torch.tensor([[2, 1]]), torch.zeros(1, 2, 4))

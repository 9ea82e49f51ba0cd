"""Steps cover every row once, in order, in pieces of bounded size on a CPU."""

import pytest
import torch

from spade_t5.kernels.row_steps import row_steps


@pytest.mark.parametrize(("num_rows", "row_elements"), [(1, 1), (600, 512), (3, 1 << 20), (1 << 18, 3)])
def test_covers_every_row_in_bounded_steps(num_rows: int, row_elements: int) -> None:
    steps = list(row_steps(torch.empty(num_rows, row_elements)))
    assert [row for step in steps for row in range(step.start, step.stop)] == list(range(num_rows))
    assert all((step.stop - step.start) * row_elements <= 1 << 18 or step.stop - step.start == 1 for step in steps)


def test_other_devices_take_all_rows_at_once() -> None:
    assert list(row_steps(torch.empty(1 << 20, 1024, device="meta"))) == [slice(0, 1 << 20)]

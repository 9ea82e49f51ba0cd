"""Steps over rows for elementwise ops on a CPU: intermediate results of one step stay in cache and are never whole tensors.

A tensor of many megabytes costs more than passing over it: the C library returns memory of that size to the system when
it is freed, so that every new one is mapped and cleared page by page.
"""

from collections.abc import Iterator

from torch import Tensor

_STEP_ELEMENTS = 1 << 18


def row_steps(x_XF: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of a matrix: about a megabyte of float32 each on a CPU, all rows at once elsewhere."""
    num_rows, row_elements = x_XF.shape
    step = max(1, _STEP_ELEMENTS // row_elements) if x_XF.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))

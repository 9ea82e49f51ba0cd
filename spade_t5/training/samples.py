"""Which samples a step was trained on: their numbers, and a digest by which two runs can be compared."""

from collections.abc import Iterable

import numpy as np

from spade_t5.data.hashing import mix64
from spade_t5.training.data import Batch

NUM_PARTS = 4
_PART_BITS = 16


def sample_numbers(batches: Iterable[Batch]) -> list[int]:
    """Numbers of the samples in some batches, in ascending order; empty where the source does not number them."""
    numbers = [batch["sample_numbers"].flatten() for batch in batches if "sample_numbers" in batch]
    return sorted(number for part in numbers for number in part.tolist() if number >= 0)


def digest_parts(numbers: list[int]) -> list[float]:
    """A hash of a set of samples that may be added up over ranks: sums of the four 16-bit parts of a hash of each number.

    Sums of 16-bit numbers are exact in float64, so the parts can travel with the other numbers of a step.
    """
    hashes = mix64(np.array(numbers, dtype=np.uint64) + np.uint64(1)) if numbers else np.empty(0, dtype=np.uint64)
    parts = [(hashes >> np.uint64(_PART_BITS * i)) & np.uint64(2**_PART_BITS - 1) for i in range(NUM_PARTS)]
    return [float(part.sum()) for part in parts]


def digest(parts: Iterable[float]) -> str:
    """The parts, summed over all ranks, as hexadecimal digits; the order of the samples does not matter, how often each came does.

    >>> digest(digest_parts([3, 5, 5])) == digest(a + b for a, b in zip(digest_parts([5]), digest_parts([5, 3])))
    True
    >>> digest(digest_parts([3, 5])) == digest(digest_parts([3, 5, 5]))
    False
    """
    return "".join(f"{int(part) % 2**32:08x}" for part in parts)

"""A hash of 64-bit words, for whole arrays at once."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def mix64(x: ArrayLike) -> NDArray[np.uint64]:
    """The splitmix64 finaliser (Steele, Lea, Flood, 2014): a bijection of 64-bit words that flips about half of the bits for every changed bit."""
    z = np.array(x, dtype=np.uint64, ndmin=1)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z

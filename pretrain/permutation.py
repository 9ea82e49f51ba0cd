"""A random order of N things, one place at a time: a keyed bijection of 0 .. N - 1 that needs no array of N.

A generalised Feistel network over pairs (l, r) with l < a, r < b and ab just above N; whatever falls on N or beyond is sent through again
until it lands inside ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Not for cryptography.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.pretrain.hashing import mix64, sample_keys

_ROUNDS = 6


def permute(indices: ArrayLike, size: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Images of some indices under the permutation of 0 .. size - 1 that (seed, epoch) chooses.

    Args:
        indices: distinct or not, each in 0 .. size - 1, shape (R,).
        size: N, at least 1.
        seed: any integer.
        epoch: counts from 0; each has its own permutation.

    Returns:
        int64 array of shape (R,). Over all indices every number occurs once.

    Raises:
        ValueError: an index is out of range.
    """
    values = np.array(indices, dtype=np.int64, ndmin=1)
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"indices: must lie in 0 .. {size - 1}")
    high = math.isqrt(size - 1) + 1
    low = -(-size // high)
    round_keys = sample_keys(seed, np.arange(_ROUNDS) + _ROUNDS * epoch, stream=2)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = np.divmod(values[outside], low)
        for number, key in enumerate(round_keys):
            if number % 2:
                right = (right + _word(left, key, low)) % low
            else:
                left = (left + _word(right, key, high)) % high
        values[outside] = left * low + right
        outside = values >= size
    return values


def _word(half: NDArray[np.int64], key: np.uint64, below: int) -> NDArray[np.int64]:
    return (mix64(half.astype(np.uint64) ^ key) % np.uint64(below)).astype(np.int64)

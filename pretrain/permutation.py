"""A random order of N things, one place at a time: a keyed bijection of 0 .. N - 1 that needs no array of N.

A generalised Feistel network over pairs (l, r) with l < a, r < b and ab just above N; whatever falls on N or beyond is sent through again
until it lands inside ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Not for cryptography.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.data.hashing import mix64
from spade_t5.pretrain.hashing import sample_keys, sub_seed

POOL_CHUNKS = 64

_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class PooledShuffle:
    """A random order of N things on disk that reads only some places of the disk at a time.

    The things are cut into chunks of consecutive ones, a few MB each. Chunks come in a random order, 64 of them at a time, and the
    things of such a pool are shuffled among each other. So a stretch of an epoch touches 64 small regions of the disk, which stay in
    memory until they are used up, and neighbours in the order are from all over the corpus.

    Every step is a bijection, so the whole is one: a rotation of all N by a random amount (so that the last, shorter chunk is somewhere
    else in every epoch), a permutation of the full chunks, and a permutation within each pool.
    """

    size: int
    """Number of things N, at least 1."""
    chunk: int
    """Consecutive things in a chunk."""
    seed: int
    """Any integer."""

    def __call__(self, draws: ArrayLike) -> NDArray[np.int64]:
        """Which thing each draw is: draws 0 .. N - 1 are the first epoch, N .. 2 N - 1 the second, and so on, each in its own order.

        Args:
            draws: numbers of at least 0, shape (R,).

        Returns:
            int64 array of shape (R,), each in 0 .. N - 1.
        """
        epochs, places = np.divmod(np.atleast_1d(np.asarray(draws, dtype=np.int64)), self.size)
        pools = places // (self.chunk * POOL_CHUNKS)
        things = np.empty_like(places)
        for epoch, pool in set(zip(epochs.tolist(), pools.tolist(), strict=True)):
            here = (epochs == epoch) & (pools == pool)
            things[here] = self._in_pool(places[here], epoch, pool)
        return things

    def _in_pool(self, places: NDArray[np.int64], epoch: int, pool: int) -> NDArray[np.int64]:
        first = pool * POOL_CHUNKS * self.chunk
        count = min(POOL_CHUNKS * self.chunk, self.size - first)
        mixed = first + permute(places - first, count, seed=sub_seed(self.seed, epoch, pool))
        positions, offsets = np.divmod(mixed, self.chunk)
        num_full = self.size // self.chunk
        is_full = positions < num_full
        if num_full:
            positions[is_full] = permute(positions[is_full], num_full, seed=sub_seed(self.seed, epoch))
        rotation = sub_seed(self.seed, epoch, -1) % self.size
        return (positions * self.chunk + offsets + rotation) % self.size


def permute(indices: ArrayLike, size: int, *, seed: int) -> NDArray[np.int64]:
    """Images of some indices under the permutation of 0 .. size - 1 that the seed chooses.

    Args:
        indices: distinct or not, each in 0 .. size - 1, shape (R,).
        size: N, at least 1.
        seed: any integer.

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
    round_keys = sample_keys(seed, np.arange(_ROUNDS), stream=2)
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

"""Counter-based random numbers: hashes of (seed, number), computed for whole arrays at once.

A stateful generator must be advanced one sample after another, so a resumed run would have to replay it. A hash needs no state: what
sample n gets depends on the seed and on n alone, whichever process asks, in whichever batch. Not for cryptography.

Mixers: splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) and `lowbias32`, a 32-bit mixer found
by exhaustive search (Wellons, "Prospecting for hash functions", 2018).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.data.hashing import mix64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def sub_seed(seed: int, *numbers: int) -> int:
    """A seed of its own for one of many uses: a hash of the seed and of the numbers that name the use, 64 bits."""
    word = mix64(seed & _MASK64)
    for number in numbers:
        word = mix64(word + mix64((number * _GOLDEN + 1) & _MASK64))
    return int(word[0])


def sample_keys(seed: int, sample_numbers: ArrayLike, *, stream: int) -> NDArray[np.uint64]:
    """One 64-bit key for every sample number; different streams of one sample are independent.

    key[r] = the output number n_r of a splitmix64 generator that starts at a hash of (seed, stream)

    Args:
        seed: any integer.
        sample_numbers: non-negative integers, shape (R,).
        stream: which of several independent uses of the same sample this is.

    Returns:
        uint64 array of shape (R,).
    """
    base = mix64(mix64(seed & _MASK64) + np.uint64(stream))
    return mix64(np.asarray(sample_numbers, dtype=np.uint64) * np.uint64(_GOLDEN) + base)


def distinct_keys(row_keys: NDArray[np.uint64], width: int) -> NDArray[np.uint32]:
    """`width` different 32-bit words for each row key: their order in a row is a random permutation.

    word[r, j] = m(j ^ a_r) ^ b_r, with (a_r, b_r) the halves of the row's key and m a bijection of 32-bit words that mixes well
    (lowbias32). The whole is a bijection in j, so the words of a row never tie.

    Args:
        row_keys: uint64 array of shape (R,).
        width: number of words for each row, at most 2^32.

    Returns:
        uint32 array of shape (R, width); word j of a row does not depend on `width`.
    """
    low = row_keys.astype(np.uint32)[:, None]
    high = (row_keys >> np.uint64(32)).astype(np.uint32)[:, None]
    words = np.arange(width, dtype=np.uint32)[None, :] ^ low
    scratch = np.empty_like(words)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        np.right_shift(words, np.uint32(shift), out=scratch)
        words ^= scratch
        words *= np.uint32(factor)
    np.right_shift(words, np.uint32(15), out=scratch)
    words ^= scratch
    words ^= high
    return words

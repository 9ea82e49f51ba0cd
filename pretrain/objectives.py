"""Span corruption, T5's pretraining objective: raw tokens in, inputs and targets out.

Follows Google's `random_spans_noise_mask`, `noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel` (T5,
arXiv:1910.10683, section 3.1.4): exact counts of noise tokens and spans, uniformly random span lengths, the first token never noise, no
sentinel after the last span. Differences: noise is a pure function of (seed, sample number), and running out of sentinels is an error
here, where the usual code goes on into the ordinary vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.errors import ConfigError
from spade_t5.pretrain.hashing import distinct_keys, sample_keys

Ints = NDArray[np.int64]

_KEPT_STREAM, _NOISE_STREAM = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanCorruption:
    """Replaces random spans by sentinels in the inputs; the targets hold each sentinel followed by its span.

    Ten tokens 10..19 with two noise spans, (12, 13) and (17, 18, 19), sentinels 99 and 98, EOS 1:

        inputs   10 11 [99] 14 15 16 [98] 1
        targets  [99] 12 13 [98] 17 18 19 1
    """

    name: ClassVar[str] = "span_corruption"

    noise_density: float = 0.15
    """Share of the raw tokens that is noise."""
    mean_noise_span_length: float = 3.0
    """Average length of a noise span, in tokens."""
    inputs_length: int = 512
    """Length of the corrupted inputs with EOS, in tokens; raw and target lengths follow from it (`lengths`)."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density: {self.noise_density} must lie between 0 and 1")
        if self.mean_noise_span_length < 1:
            raise ValueError(f"mean_noise_span_length: {self.mean_noise_span_length} must be at least 1 token")
        if self.noise_density / self.mean_noise_span_length > 1 - self.noise_density:
            raise ValueError(
                f"noise_density: {self.noise_density} leaves no token between spans of {self.mean_noise_span_length} tokens; "
                "lower it or raise mean_noise_span_length"
            )
        if self.inputs_length < 3:
            raise ValueError(f"inputs_length: {self.inputs_length} must be at least 3: one token, one sentinel, EOS")

    def counts(self, raw_lengths: ArrayLike) -> tuple[Ints, Ints]:
        """Numbers of noise tokens and of noise spans in documents of these lengths.

        N = round(T d), at least 1 and at most T - 1;   S = round(N / m), at least 1, and never more than N or T - N

        Args:
            raw_lengths: lengths T in tokens, each at least 2, shape (R,).

        Returns:
            N and S, int64 arrays of shape (R,).

        Raises:
            ValueError: a document has fewer than two tokens.
        """
        raw = np.atleast_1d(np.asarray(raw_lengths, dtype=np.int64))
        if raw.size and raw.min() < 2:
            raise ValueError(f"span corruption needs documents of at least 2 tokens, not {raw.min()}")
        # rint rounds halves to even, as Python's and TensorFlow's round do.
        num_noise = np.clip(np.rint(raw * self.noise_density).astype(np.int64), 1, raw - 1)
        num_spans = np.maximum(np.rint(num_noise / self.mean_noise_span_length).astype(np.int64), 1)
        return num_noise, np.minimum(num_spans, np.minimum(num_noise, raw - num_noise))

    def lengths(self, inputs_length: int | None = None) -> tuple[int, int, int]:
        """Raw, input and target lengths that fill `inputs_length` exactly.

        inputs = T - N + S + 1,  targets = N + S + 1  (each with EOS); T is the largest whose inputs fit. As in T5, at a density of one
        half targets longer than the inputs cost one raw token.

        >>> SpanCorruption().lengths(512)
        (568, 512, 114)

        Args:
            inputs_length: tokens in the inputs; the field of the same name by default.

        Returns:
            (raw length, inputs length, targets length), in tokens.
        """
        wanted = self.inputs_length if inputs_length is None else inputs_length
        # Inputs never shrink as T grows, and hold at least (1 - d) T tokens: a bounded range for a vectorised search.
        candidates = np.arange(2, int(wanted / (1 - self.noise_density)) + 3)
        num_noise, num_spans = self.counts(candidates)
        fitting = np.flatnonzero(candidates - num_noise + num_spans + 1 <= wanted)
        if not fitting.size:
            raise ValueError(f"inputs_length: {wanted} is too short for span corruption")
        best = int(fitting[-1])
        if self.noise_density == 0.5 and 2 * num_noise[best] > candidates[best]:
            best -= 1
        raw, noise, spans = int(candidates[best]), int(num_noise[best]), int(num_spans[best])
        return raw, raw - noise + spans + 1, noise + spans + 1

    def num_spans(self, inputs_length: int | None = None) -> int:
        """Noise spans, and so sentinels, that rows of `inputs_length` need."""
        return int(self.counts(self.lengths(inputs_length)[0])[1][0])

    def check_sentinels(self, num_available: int, *, raw_lengths: ArrayLike | None = None) -> None:
        """Fails if rows of this objective need more sentinels than there are.

        Args:
            num_available: sentinels that the tokenizer has.
            raw_lengths: document lengths; by default the raw length that `lengths` gives.

        Raises:
            ConfigError: naming spans needed, sentinels available and the remedy.
        """
        raw = np.atleast_1d(np.asarray(self.lengths()[0] if raw_lengths is None else raw_lengths))
        needed = int(self.counts(raw)[1].max(initial=0))
        if needed > num_available:
            raise ConfigError(
                f"objective: {int(raw.max())} raw tokens with noise_density {self.noise_density} and mean_noise_span_length "
                f"{self.mean_noise_span_length} need {needed} sentinels, the tokenizer has {num_available}: make a tokenizer with "
                f"num_sentinels of at least {needed}, or raise mean_noise_span_length or shorten inputs_length"
            )

    def corrupt(
        self,
        tokens: NDArray[Any],
        sample_numbers: ArrayLike,
        *,
        seed: int,
        sentinel_ids: Sequence[int] | Ints,
        eos_token_id: int,
    ) -> tuple[Ints, Ints]:
        """Corrupts a batch of equally long rows.

        Args:
            tokens: raw token ids, shape (R, T), any integer type.
            sample_numbers: global number of each row, shape (R,); with the seed it decides the row's noise.
            seed: seed of the run.
            sentinel_ids: ids in order of use, span 0 first.
            eos_token_id: id that ends inputs and targets.

        Returns:
            inputs of shape (R, T - N + S + 1) and targets of shape (R, N + S + 1), int64.

        Raises:
            ConfigError: there are too few sentinels.
        """
        num_rows, length = tokens.shape
        inputs, _, targets, _ = self.corrupt_documents(
            tokens.reshape(-1),
            np.full(num_rows, length),
            sample_numbers,
            seed=seed,
            sentinel_ids=sentinel_ids,
            eos_token_id=eos_token_id,
        )
        return inputs.reshape(num_rows, -1), targets.reshape(num_rows, -1)

    def corrupt_documents(
        self,
        tokens: NDArray[Any],
        raw_lengths: ArrayLike,
        sample_numbers: ArrayLike,
        *,
        seed: int,
        sentinel_ids: Sequence[int] | Ints,
        eos_token_id: int,
    ) -> tuple[Ints, Ints, Ints, Ints]:
        """Corrupts documents of any lengths, laid end to end; a document's noise does not depend on the others.

        Args:
            tokens: raw token ids of all documents, shape (sum of lengths,).
            raw_lengths: length of each document in tokens, at least 2, shape (R,).
            sample_numbers: global number of each document, shape (R,).
            seed: seed of the run.
            sentinel_ids: ids in order of use, span 0 first.
            eos_token_id: id that ends the inputs and the targets of every document.

        Returns:
            (inputs, their lengths, targets, their lengths): token ids end to end and one length for each document, int64.

        Raises:
            ConfigError: there are too few sentinels.
            ValueError: a document has fewer than two tokens.
        """
        raw = np.asarray(raw_lengths, dtype=np.int64)
        num_noise, num_spans = self.counts(raw)
        sentinels = np.asarray(sentinel_ids, dtype=np.int64)
        if num_spans.max(initial=0) > len(sentinels):
            self.check_sentinels(len(sentinels), raw_lengths=raw)

        # One entry for every span of every document, documents one after another.
        first = np.cumsum(num_spans) - num_spans
        last = first + num_spans - 1
        sentinel = sentinels[np.arange(last[-1] + 1) - np.repeat(first, num_spans)]
        kept_end = _random_ends(
            raw - num_noise, num_spans, last, sample_keys(seed, sample_numbers, stream=_KEPT_STREAM)
        )
        noise_end = _random_ends(num_noise, num_spans, last, sample_keys(seed, sample_numbers, stream=_NOISE_STREAM))
        kept_begin, noise_begin = _previous(kept_end, first), _previous(noise_end, first)
        kept_start = np.repeat(np.cumsum(raw) - raw, num_spans) + kept_begin + noise_begin
        kept_length, noise_length = kept_end - kept_begin, noise_end - noise_begin

        # A run of the inputs is kept tokens, then a sentinel; a run of the targets is a sentinel, then noise; EOS follows the last run.
        # Runs are copied with as many neighbours as they have special tokens, which are then written over the neighbours.
        run_length = kept_length + 1
        run_length[last] += 1
        inputs, begin = _copy_runs(tokens, kept_start, run_length)
        inputs[begin + kept_length] = sentinel
        inputs[(begin + kept_length)[last] + 1] = eos_token_id

        run_length = noise_length + 1
        run_length[last] += 1
        targets, begin = _copy_runs(tokens, kept_start + kept_length - 1, run_length)
        targets[begin] = sentinel
        targets[(begin + noise_length)[last] + 1] = eos_token_id
        return inputs, raw - num_noise + num_spans + 1, targets, num_noise + num_spans + 1


def _random_ends(num_items: Ints, num_segments: Ints, last: Ints, keys: NDArray[np.uint64]) -> Ints:
    """Cuts rows of items into non-empty segments, every way equally likely (Google's `_random_segmentation`).

    Cutting n items into s segments is choosing s - 1 of the n - 1 gaps between items: those with the smallest keys.

    Args:
        num_items: n of each row, shape (R,).
        num_segments: s of each row, at most n, shape (R,).
        last: position of each row's last segment in the result, shape (R,).
        keys: one random key for each row, shape (R,).

    Returns:
        For each segment, row after row, the number of items up to and including it; shape (sum of s,).
    """
    ends = np.empty(int(num_segments.sum()), dtype=np.int64)
    is_inner = np.ones(len(ends), dtype=bool)
    is_inner[last] = False
    ends[last] = num_items
    num_gaps, num_cuts = num_items - 1, num_segments - 1
    width, most_cuts = int(num_gaps.max(initial=0)), int(num_cuts.max(initial=0))
    if most_cuts == 0:
        return ends
    words = distinct_keys(keys, width)
    if (num_gaps == width).all() and (num_cuts == most_cuts).all():
        is_cut = words <= np.partition(words, most_cuts - 1, axis=1)[:, most_cuts - 1 : most_cuts]
    else:
        is_gap = np.arange(width) < num_gaps[:, None]
        ordered = np.sort(np.where(is_gap, words, np.uint32(2**32 - 1)), axis=1)
        threshold = np.take_along_axis(ordered, np.maximum(num_cuts - 1, 0)[:, None], axis=1)
        is_cut = (words <= threshold) & is_gap & (num_cuts > 0)[:, None]
    ends[is_inner] = np.flatnonzero(is_cut) - np.repeat(np.arange(len(num_cuts)) * width, num_cuts) + 1
    return ends


def _previous(ends: Ints, first: Ints) -> Ints:
    """Where each segment begins, from where the segments end: the end of the one before, 0 for the first of a row."""
    begins = np.empty_like(ends)
    begins[1:] = ends[:-1]
    begins[first] = 0
    return begins


def _copy_runs(tokens: NDArray[Any], starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Joins tokens[start : start + length] of all runs; returns them and where each run begins in the result."""
    begins = np.cumsum(lengths) - lengths
    # Positions go up by one, with a jump at every new run. One large array serves for them and for the result: fresh memory costs
    # more here than arithmetic.
    joined = np.ones(begins[-1] + lengths[-1], dtype=np.int64)
    joined[0] = starts[0]
    joined[begins[1:]] = starts[1:] - starts[:-1] - lengths[:-1] + 1
    np.cumsum(joined, out=joined)
    # The last run may reach behind the end of the tokens, where the caller writes over it.
    joined[...] = tokens.take(joined, mode="clip")
    return joined, begins

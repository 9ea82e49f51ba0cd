"""Gap sentences: whole sentences that say most about their document become the target.

PEGASUS (arXiv:1912.08777, section 3.1), which LongT5 took over as "principle sentences generation" (arXiv:2112.07916). The score
of a sentence is ROUGE-1 F1 between it and the rest of the document, each sentence by itself and words counted once (their Ind-Uniq). Differences:
scores compare token ids rather than words, and each sentence has a sentinel of its own, behind which it stands in the targets, so that the text can
be put together again.

Sentences are found from token ids, by the pieces that end them. Abbreviations ("Mr. Smith") are mistaken for ends, which costs little here: a
sentence is then in two parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.data.hashing import mix64
from spade_t5.errors import ConfigError
from spade_t5.pretrain.hashing import sample_keys
from spade_t5.pretrain.objectives.denoiser import (
    MOST_TOKENS,
    BoundDenoiser,
    Examples,
    Ints,
    Lengths,
    Objective,
    as_lengths,
    check_side_lengths,
)
from spade_t5.pretrain.objectives.spans import replace_spans, span_lengths
from spade_t5.pretrain.objectives.vocabulary import Vocabulary

_SCORE_STREAM = 0
_ENDS, _CLOSES, _STOPS, _STARTS_WORD = 1, 2, 4, 8
_SCORED_AT_ONCE_TOKENS = 2**19


@dataclass(frozen=True, kw_only=True, slots=True)
class GapSentences(Objective):
    """Replaces the best sentences of a segment by sentinels; the targets hold each sentinel followed by its sentence, in the order of the text.

    With n sentences in a segment, the best round(n sentence_ratio) are taken, at least one and at most n - 1, as long as the targets have room;
    sentences that would not fit alone are passed over. A segment in which none can be taken, because it is a single sentence, loses its last
    round(T sentence_ratio) tokens instead, at least one, as much of them as there is room for.

    Three sentences that end in 5, of which the second shares most with the others; sentinel 99, EOS 1:

    >>> from spade_t5.pretrain.objectives import Vocabulary
    >>> vocabulary = Vocabulary(
    ...     vocab_size=100, pad_token_id=0, eos_token_id=1, sentinel_ids=(99, 98), sentence_end_ids=(5,), word_start_ids=(10, 11, 12)
    ... )
    >>> (denoiser,) = GapSentences(inputs_length=12, targets_length=6).bind(vocabulary)
    >>> tokens = np.array([10, 20, 5, 11, 20, 21, 5, 12, 21, 5])
    >>> examples = denoiser.corrupt_documents(tokens, [10], [0], seed=0)
    >>> examples.inputs.tolist(), examples.targets.tolist()
    ([10, 20, 5, 99, 12, 21, 5, 1], [99, 11, 20, 21, 5, 1])
    """

    name: ClassVar[str] = "gap_sentences"

    sentence_ratio: float = 0.3
    """Share of a segment's sentences that is taken out."""
    inputs_length: int = 512
    """Most tokens of the inputs with EOS; a segment has one token less."""
    targets_length: int = 256
    """Most tokens of the targets with EOS."""
    max_spans: int = 100
    """Most sentences taken out of a segment, and so sentinels."""
    score_noise: float = 0.0
    """Scores are multiplied by a random number between 1 - score_noise and 1 + score_noise, so that another epoch takes other sentences
    (0.2 in PEGASUS's stochastic variant)."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 < self.sentence_ratio < 1:
            raise ValueError(f"sentence_ratio: {self.sentence_ratio} must lie between 0 and 1")
        check_side_lengths(
            at_least=3,
            content="one token, one sentinel, EOS",
            inputs_length=self.inputs_length,
            targets_length=self.targets_length,
        )
        if not 1 <= self.max_spans <= MOST_TOKENS:
            raise ValueError(f"max_spans: {self.max_spans} must be at least 1 and at most {MOST_TOKENS}")
        if not 0 <= self.score_noise <= 1:
            raise ValueError(f"score_noise: {self.score_noise} must lie between 0 and 1")

    def denoisers(self, vocabulary: Vocabulary) -> list[BoundDenoiser]:
        """See `Objective`.

        Raises:
            ConfigError: no piece of the tokenizer ends a sentence.
        """
        if not vocabulary.sentence_end_ids and not vocabulary.stop_ids:
            raise ConfigError(
                "objective: gap_sentences needs a tokenizer with pieces that end in . ? or !; use another objective"
            )
        raw = self.inputs_length - 1
        most_sentences = int(self.most_sentences(np.array([raw]))[0])
        kinds = np.zeros(vocabulary.vocab_size, dtype=np.uint8)
        for ids, kind in (
            (vocabulary.sentence_end_ids, _ENDS),
            (vocabulary.closing_ids, _CLOSES),
            (vocabulary.stop_ids, _STOPS),
            (vocabulary.word_start_ids, _STARTS_WORD),
        ):
            kinds[list(ids)] |= kind
        return [
            GapSentenceDenoiser(
                label=f"gap {self.sentence_ratio:g}",
                lengths=Lengths(raw, self.inputs_length, self.targets_length),
                has_fixed_lengths=False,
                needs_tokens_for_lengths=True,
                num_sentinels=min(most_sentences, (self.targets_length - 1) // 2),
                objective=self,
                kinds=kinds,
                sentinel_ids=vocabulary.sentinel_ids,
                eos_token_id=vocabulary.eos_token_id,
            )
        ]

    def most_sentences(self, num_sentences: Ints) -> Ints:
        """Sentences to take out of segments with so many, each at least two."""
        wanted = np.rint(num_sentences * self.sentence_ratio).astype(np.int64)
        return np.minimum(np.clip(wanted, 1, num_sentences - 1), self.max_spans)


@dataclass(frozen=True, slots=True)
class _Sentences:
    """The sentences of segments laid end to end."""

    begin: Ints
    """First token of each sentence, counted over all segments."""
    length: Ints
    """Tokens of each sentence."""
    segment: Ints
    """Segment that each sentence is in."""
    first: Ints
    """First sentence of each segment."""
    count: Ints
    """Sentences of each segment."""

    def place(self) -> Ints:
        """Place of each sentence in its segment, from 0."""
        return np.arange(len(self.begin)) - np.repeat(self.first, self.count)


@dataclass(frozen=True, kw_only=True, slots=True)
class GapSentenceDenoiser(BoundDenoiser):
    """Replaces sentences by sentinels."""

    objective: GapSentences
    """How many sentences, and how many tokens at most."""
    kinds: NDArray[np.uint8] = field(repr=False, compare=False)
    """For each id, whether it ends, closes, stops or starts something: bits."""
    sentinel_ids: tuple[int, ...]
    """Ids in order of use."""
    eos_token_id: int
    """Id that ends inputs and targets."""

    def example_lengths(
        self, tokens: NDArray[Any] | None, raw_lengths: ArrayLike, sample_numbers: ArrayLike, *, seed: int
    ) -> tuple[Ints, Ints]:
        """See `BoundDenoiser`."""
        if tokens is None:
            raise ValueError("lengths of gap sentences depend on the tokens")
        raw = as_lengths(raw_lengths, at_least=self.min_raw_length)
        segment, _, length = self._spans(tokens, raw, sample_numbers, seed)
        num_noise = np.bincount(segment, weights=length, minlength=len(raw)).astype(np.int64)
        return span_lengths(raw, num_noise, np.bincount(segment, minlength=len(raw)))

    def corrupt_documents(
        self, tokens: NDArray[Any], raw_lengths: ArrayLike, sample_numbers: ArrayLike, *, seed: int
    ) -> Examples:
        """See `BoundDenoiser`."""
        raw = as_lengths(raw_lengths, at_least=self.min_raw_length)
        segment, begin, length = self._spans(tokens, raw, sample_numbers, seed)
        num_spans = np.bincount(segment, minlength=len(raw))
        noise_end = _running_sum(length, segment, num_spans)
        begin_in_segment = begin - (np.cumsum(raw) - raw)[segment]
        return replace_spans(
            tokens,
            raw,
            num_spans,
            begin_in_segment - (noise_end - length),
            noise_end,
            sentinel_ids=self.sentinel_ids,
            eos_token_id=self.eos_token_id,
        )

    def sentinel_remedy(self, num_available: int) -> str:
        """See `BoundDenoiser`."""
        return f"give the tokenizer num_sentinels={self.num_sentinels}, or set max_spans={num_available}"

    def _spans(self, tokens: NDArray[Any], raw: Ints, sample_numbers: ArrayLike, seed: int) -> tuple[Ints, Ints, Ints]:
        """Segment, first token and length of every span of noise, in the order of the text."""
        sentences = self._sentences(tokens, raw)
        score = np.concatenate(
            [np.empty(0), *(_rouge(*part, vocab_size=len(self.kinds)) for part in _parts(tokens, raw, sentences))]
        )
        if self.objective.score_noise:
            keys = sample_keys(seed, sample_numbers, stream=_SCORE_STREAM)[sentences.segment]
            fraction = (mix64(keys + mix64(sentences.place() + 1)) >> np.uint64(11)) / 2**53
            score = score * (1 + self.objective.score_noise * (2 * fraction - 1))
        is_taken = self._best(sentences, score)
        segment, begin, length = sentences.segment[is_taken], sentences.begin[is_taken], sentences.length[is_taken]
        without = np.flatnonzero(np.bincount(segment, minlength=len(raw)) == 0)
        if without.size:
            share = np.rint(raw[without] * self.objective.sentence_ratio).astype(np.int64)
            tail = np.minimum(np.clip(share, 1, raw[without] - 1), self._room)
            segment = np.concatenate([segment, without])
            order = np.argsort(segment, kind="stable")
            begin = np.concatenate([begin, np.cumsum(raw)[without] - tail])[order]
            segment, length = segment[order], np.concatenate([length, tail])[order]
        return segment, begin, length

    @property
    def _room(self) -> int:
        """Noise tokens that the targets can hold beside one sentinel and EOS."""
        return self.objective.targets_length - 2

    def _sentences(self, tokens: NDArray[Any], raw: Ints) -> _Sentences:
        """Cuts segments into sentences; what is left at the end of a segment is one too."""
        kinds = self.kinds[tokens]
        stop = np.cumsum(raw)
        first_token = stop - raw
        is_over = (kinds & _ENDS) != 0
        for _ in range(2):  # a quote and a bracket may close behind the full stop
            closed = np.zeros_like(is_over)
            closed[1:] = is_over[:-1] & ((kinds[1:] & _CLOSES) != 0)
            closed[first_token] = False
            is_over |= closed
        is_end = (kinds & _STOPS) != 0
        is_end[:-1] |= is_over[:-1] & ((kinds[1:] & _STARTS_WORD) != 0)
        is_end[stop - 1] = True
        ends = np.flatnonzero(is_end) + 1
        begin = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(ends)]
        first = np.searchsorted(begin, first_token)
        count = np.diff(first, append=len(begin))
        return _Sentences(begin, ends - begin, np.repeat(np.arange(len(raw)), count), first, count)

    def _best(self, sentences: _Sentences, score: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which sentences are taken."""
        fits = sentences.length <= self._room
        order = np.lexsort((-score, ~fits, sentences.segment))  # best first, equal ones in the order of the text
        used = _running_sum(sentences.length[order] + 1, sentences.segment, sentences.count)
        most = np.where(sentences.count > 1, self.objective.most_sentences(np.maximum(sentences.count, 2)), 0)
        chosen = fits[order] & (used < self.objective.targets_length) & (sentences.place() < most[sentences.segment])
        is_taken = np.zeros(len(order), dtype=bool)
        is_taken[order] = chosen
        return is_taken


def _running_sum(values: Ints, segment: Ints, count: Ints) -> Ints:
    """Sum up to and including each value within its segment; `count` values for each segment."""
    total = np.cumsum(values)
    before = np.concatenate([np.zeros(1, dtype=np.int64), total])[np.cumsum(count) - count]
    return total - before[segment]


def _parts(tokens: NDArray[Any], raw: Ints, sentences: _Sentences) -> Iterator[tuple[NDArray[Any], _Sentences]]:
    """Whole segments with their sentences, so many that they are scored in bounded memory and within the caches."""
    stop = np.cumsum(raw)
    first = 0
    while first < len(raw):
        start = int(stop[first] - raw[first])
        last = max(int(np.searchsorted(stop, start + _SCORED_AT_ONCE_TOKENS, side="right")), first + 1)
        one = sentences.first[first]
        those = slice(one, sentences.first[last - 1] + sentences.count[last - 1])
        yield (
            tokens[start : int(stop[last - 1])],
            _Sentences(
                sentences.begin[those] - start,
                sentences.length[those],
                sentences.segment[those] - first,
                sentences.first[first:last] - one,
                sentences.count[first:last],
            ),
        )
        first = last


def _rouge(tokens: NDArray[Any], sentences: _Sentences, *, vocab_size: int) -> NDArray[np.float64]:
    """ROUGE-1 F1 between each sentence and the rest of its segment, each different id counted once.

    F1 = 2 |A & B| / (|A| + |B|)  for the sets A of ids of the sentence and B of ids of the other sentences

    An id of the sentence is in the others too if more than one sentence has it; so one sort of (segment, id, sentence) gives all counts.
    """
    sentence_bits = int(sentences.count.max()).bit_length()
    token_bits = int(vocab_size).bit_length()
    key = tokens.astype(np.int64)
    key <<= sentence_bits
    key |= np.repeat((sentences.segment << (token_bits + sentence_bits)) | sentences.place(), sentences.length)
    key.sort()
    key = key[np.concatenate([[True], key[1:] != key[:-1]])]
    group = key >> sentence_bits
    is_first = np.concatenate([[True], group[1:] != group[:-1]])
    is_alone = is_first & np.concatenate([is_first[1:], [True]])
    segment = key >> (token_bits + sentence_bits)
    sentence = sentences.first[segment] + (key & ((1 << sentence_bits) - 1))
    num_ids = np.bincount(sentence, minlength=len(sentences.begin))
    num_own = np.bincount(sentence[is_alone], minlength=len(sentences.begin))
    num_all = np.bincount(segment[is_first], minlength=len(sentences.first))[sentences.segment]
    return 2 * (num_ids - num_own) / (num_ids + num_all - num_own)

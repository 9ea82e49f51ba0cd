"""Several denoisers in one run, each with a weight and, if wanted, a text before its inputs; and UL2's seven."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spade_t5.errors import ConfigError
from spade_t5.pretrain.objectives.denoiser import BoundDenoiser, Examples, Ints, Lengths, Objective
from spade_t5.pretrain.objectives.gap_sentences import GapSentences
from spade_t5.pretrain.objectives.iid_masking import IidMasking, UniformMasking
from spade_t5.pretrain.objectives.prefix_lm import LMAdaptation, PrefixLM
from spade_t5.pretrain.objectives.span_corruption import SpanCorruption
from spade_t5.pretrain.objectives.vocabulary import Vocabulary
from spade_t5.pretrain.order import weight_at

_MOST_WEIGHT = 1e9
_LATEST_BLOCK = 2**40

SingleObjective = SpanCorruption | PrefixLM | LMAdaptation | IidMasking | UniformMasking | GapSentences


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightStep:
    """From which block of draws on a denoiser has which weight."""

    first_block: int
    """First block of 10,000 draws, from 0."""
    weight: float
    """Weight relative to the other denoisers; 0: it is not drawn."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 <= self.first_block <= _LATEST_BLOCK:
            raise ValueError(f"first_block: {self.first_block} must be at least 0 and at most {_LATEST_BLOCK}")
        _check_weight(self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureEntry:
    """One objective of a mixture."""

    denoiser: SingleObjective
    """What is done to the text."""
    weight: float | tuple[WeightStep, ...] = 1.0
    """Share of the draws relative to the other entries; or a schedule of steps, the first of them at block 0. An entry that is 0 throughout is
    left out: rows, sentinels and evaluation do not know of it."""
    prefix: str = ""
    """Text before the inputs, such as "[R]"; counts towards the length of the inputs."""

    def __post_init__(self) -> None:
        """Checks the weights."""
        if not isinstance(self.weight, tuple):
            _check_weight(self.weight)
        blocks = [first_block for first_block, _ in self.steps()]
        if not blocks or blocks[0] != 0 or blocks != sorted(set(blocks)):
            raise ValueError(
                f"weight: steps begin at the blocks {blocks}; let the first be 0 and each later than the one before"
            )

    def steps(self) -> tuple[tuple[int, float], ...]:
        """The weight as steps (first block, weight)."""
        if isinstance(self.weight, tuple):
            return tuple((step.first_block, step.weight) for step in self.weight)
        return ((0, self.weight),)

    def is_drawn(self) -> bool:
        """Whether any step has a weight above 0."""
        return any(weight for _, weight in self.steps())


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture(Objective):
    """Any list of denoisers.

    >>> from spade_t5.pretrain.objectives import Vocabulary
    >>> vocabulary = Vocabulary(vocab_size=32128, pad_token_id=0, eos_token_id=1, sentinel_ids=tuple(range(32099, 31999, -1)))
    >>> mixture = Mixture(entries=(
    ...     MixtureEntry(denoiser=SpanCorruption(), weight=3),
    ...     MixtureEntry(denoiser=PrefixLM(), weight=(WeightStep(first_block=0, weight=0), WeightStep(first_block=50, weight=1))),
    ... ))
    >>> for denoiser in mixture.bind(vocabulary):
    ...     print(denoiser.label, denoiser.weights, tuple(denoiser.lengths))
    span d0.15 m3 ((0, 3.0),) (568, 512, 114)
    prefix 0.25 ((0, 0.0), (50, 1.0)) (681, 512, 171)
    """

    name: ClassVar[str] = "mixture"

    entries: tuple[MixtureEntry, ...]
    """The denoisers with their weights."""

    def __post_init__(self) -> None:
        """Checks that there is something to draw from, always."""
        schedules = [entry.steps() for entry in self.entries]
        for start in sorted({0, *(first_block for steps in schedules for first_block, _ in steps)}):
            if not any(weight_at(steps, start) for steps in schedules):
                raise ValueError(
                    f"entries: none has a weight above 0 from block {start} on; give at least one denoiser a positive weight"
                )

    def denoisers(self, vocabulary: Vocabulary) -> list[BoundDenoiser]:
        """See `Objective`."""
        drawn = [entry for entry in self.entries if entry.is_drawn()]
        bound = [denoiser for entry in drawn for denoiser in _entry_denoisers(entry, vocabulary)]
        if {denoiser.documents_end_with_eos for denoiser in bound} >= {True, False}:
            raise ConfigError(
                "objective.entries: span corruption of style google and of style hf need different stores; choose one"
            )
        return _told_apart(bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class UL2(Objective):
    """UL2's mixture of seven denoisers, drawn alike (arXiv:2205.05131, table 1).

    R, regular: 15 % in spans of 3 or 8 tokens. S, sequential: the last 25 % as in prefix LM. X, extreme: 50 % in spans of 3, 8 or 64 tokens, and
    15 % in spans of 64. For other lists, weights or schedules write a `Mixture`. (The code in the paper's appendix does S by T5's prefix LM, which
    splits at a random place: `PrefixLM(suffix_share=None)`.)

    >>> from spade_t5.pretrain.objectives import Vocabulary
    >>> vocabulary = Vocabulary(vocab_size=32256, pad_token_id=0, eos_token_id=1, sentinel_ids=tuple(range(32000, 32256)))
    >>> for denoiser in UL2().bind(vocabulary):
    ...     print(f"{denoiser.label:15}", *denoiser.lengths, denoiser.num_sentinels)
    span d0.15 m3   568 512 114 28
    span d0.15 m8   588 512 100 11
    prefix 0.25     681 512 171 0
    span d0.5 m3    766 512 512 128
    span d0.5 m8    908 512 512 57
    span d0.15 m64  600 512 92 1
    span d0.5 m64   1006 512 512 8
    """

    name: ClassVar[str] = "ul2"

    inputs_length: int = 512
    """Most tokens of the inputs with prefix and EOS."""
    targets_length: int | None = None
    """Most tokens of the targets with EOS; null: as many as `inputs_length`."""
    max_spans: int | None = None
    """Most noise spans of a segment; see SpanCorruption. UL2 needs 128 sentinels at 512 tokens without it."""
    style: Literal["google", "hf"] = "google"
    """Text that it is for; see SpanCorruption."""
    regular_prefix: str = ""
    """Text before the inputs of the R denoisers; "[R]" in the paper. Empty: none."""
    sequential_prefix: str = ""
    """Text before the inputs of the S denoiser; "[S]" in the paper. Empty: none."""
    extreme_prefix: str = ""
    """Text before the inputs of the X denoisers; "[X]" in the paper. Empty: none."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        self.mixture()

    def mixture(self) -> Mixture:
        """The same as a list."""
        # X denoisers have as many targets as inputs, and must not have more: rows are as wide as the longest of each.
        targets_length = self.inputs_length if self.targets_length is None else self.targets_length

        def spans(noise_density: float, mean_noise_span_length: float, prefix: str) -> MixtureEntry:
            denoiser = SpanCorruption(
                noise_density=noise_density,
                mean_noise_span_length=mean_noise_span_length,
                inputs_length=self.inputs_length,
                targets_length=targets_length,
                max_spans=self.max_spans,
                style=self.style,
            )
            return MixtureEntry(denoiser=denoiser, prefix=prefix)

        sequential = PrefixLM(inputs_length=self.inputs_length, targets_length=targets_length, suffix_share=0.25)
        return Mixture(
            entries=(
                spans(0.15, 3, self.regular_prefix),
                spans(0.15, 8, self.regular_prefix),
                MixtureEntry(denoiser=sequential, prefix=self.sequential_prefix),
                spans(0.5, 3, self.extreme_prefix),
                spans(0.5, 8, self.extreme_prefix),
                spans(0.15, 64, self.extreme_prefix),
                spans(0.5, 64, self.extreme_prefix),
            )
        )

    def denoisers(self, vocabulary: Vocabulary) -> list[BoundDenoiser]:
        """See `Objective`."""
        return self.mixture().denoisers(vocabulary)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixedDenoiser(BoundDenoiser):
    """Another denoiser with a few ids before its inputs."""

    denoiser: BoundDenoiser
    """The other one, whose inputs are shorter by the prefix."""
    prefix_ids: tuple[int, ...]
    """Ids of the prefix."""

    def example_lengths(
        self, tokens: NDArray[Any] | None, raw_lengths: ArrayLike, sample_numbers: ArrayLike, *, seed: int
    ) -> tuple[Ints, Ints]:
        """See `BoundDenoiser`."""
        inputs, targets = self.denoiser.example_lengths(tokens, raw_lengths, sample_numbers, seed=seed)
        return inputs + len(self.prefix_ids), targets

    def corrupt_documents(
        self, tokens: NDArray[Any], raw_lengths: ArrayLike, sample_numbers: ArrayLike, *, seed: int
    ) -> Examples:
        """See `BoundDenoiser`."""
        made = self.denoiser.corrupt_documents(tokens, raw_lengths, sample_numbers, seed=seed)
        input_lengths = made.input_lengths + len(self.prefix_ids)
        begins = np.cumsum(input_lengths) - input_lengths
        where = begins[:, None] + np.arange(len(self.prefix_ids))
        is_prefix = np.zeros(input_lengths.sum(), dtype=bool)
        is_prefix[where] = True
        inputs = np.empty(len(is_prefix), dtype=np.int64)
        inputs[where] = self.prefix_ids
        inputs[~is_prefix] = made.inputs
        return made._replace(inputs=inputs, input_lengths=input_lengths)

    def sentinel_remedy(self, num_available: int) -> str:
        """See `BoundDenoiser`."""
        return self.denoiser.sentinel_remedy(num_available)


def _entry_denoisers(entry: MixtureEntry, vocabulary: Vocabulary) -> list[BoundDenoiser]:
    prefix_ids = vocabulary.prefix_ids(entry.prefix)
    inputs_length = entry.denoiser.inputs_length - len(prefix_ids)
    try:
        objective = dataclasses.replace(entry.denoiser, inputs_length=inputs_length)
    except ValueError as error:
        raise ConfigError(f"objective: prefix {entry.prefix!r} takes {len(prefix_ids)} tokens: {error}") from None
    bound = objective.denoisers(vocabulary)
    if entry.prefix:
        bound = [_prefixed(denoiser, entry.prefix, prefix_ids) for denoiser in bound]
    weights = tuple((first_block, weight / len(bound)) for first_block, weight in entry.steps())
    return [dataclasses.replace(denoiser, weights=weights) for denoiser in bound]


def _prefixed(denoiser: BoundDenoiser, prefix: str, prefix_ids: tuple[int, ...]) -> PrefixedDenoiser:
    shared = {field.name: getattr(denoiser, field.name) for field in dataclasses.fields(BoundDenoiser)}
    raw, inputs, targets = denoiser.lengths
    shared |= {"label": f"{prefix} {denoiser.label}", "lengths": Lengths(raw, inputs + len(prefix_ids), targets)}
    return PrefixedDenoiser(denoiser=denoiser, prefix_ids=prefix_ids, **shared)


def _told_apart(bound: Sequence[BoundDenoiser]) -> list[BoundDenoiser]:
    """The same denoisers; to labels that several have, the lengths are added where they differ, or else a number.

    Raises:
        ConfigError: two are the same in all but their weights.
    """
    without_weights = [dataclasses.replace(denoiser, weights=()) for denoiser in bound]
    for k, denoiser in enumerate(without_weights):
        if denoiser in without_weights[:k]:
            raise ConfigError(
                f"objective.entries: {denoiser.label!r} occurs twice; give it once with the sum of the weights, or prefixes"
            )
    labels = [denoiser.label for denoiser in bound]
    labels = _with_what_differs(labels, "L", [denoiser.lengths.inputs for denoiser in bound])
    labels = _with_what_differs(labels, "T", [denoiser.lengths.targets for denoiser in bound])
    labels = _with_what_differs(labels, "#", [labels[: k + 1].count(label) for k, label in enumerate(labels)])
    return [dataclasses.replace(denoiser, label=label) for denoiser, label in zip(bound, labels, strict=True)]


def _with_what_differs(labels: Sequence[str], letter: str, values: Sequence[int]) -> list[str]:
    """Labels with a value behind those that stand for several values."""
    own_values: dict[str, set[int]] = {}
    for label, value in zip(labels, values, strict=True):
        own_values.setdefault(label, set()).add(value)
    return [
        f"{label} {letter}{value}" if len(own_values[label]) > 1 else label
        for label, value in zip(labels, values, strict=True)
    ]


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= _MOST_WEIGHT:
        raise ValueError(f"weight: {weight} must be a number from 0 to {_MOST_WEIGHT:g}")

"""What a model is pretrained on: token stores, alone or mixed, and how their documents become rows."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from transformers import PreTrainedTokenizerFast

from spade_t5.errors import ConfigError
from spade_t5.hf.tokenizer import load_tokenizer, tokenizer_hash
from spade_t5.pretrain.draws import Pair, SegmentDraws
from spade_t5.pretrain.objectives import BoundDenoiser, ObjectiveConfig, Vocabulary
from spade_t5.pretrain.order import WeightSteps, weight_at
from spade_t5.pretrain.rows import ConcatenatedRows, HeldOutRows, PackedRows
from spade_t5.pretrain.segments import ConcatenatedSegments, DocumentSegments, Segments
from spade_t5.pretrain.staging import stage
from spade_t5.pretrain.store import TokenStore
from spade_t5.training.data import TrainingRows

logger = logging.getLogger(__name__)

_LARGEST_RATE = 1e9
_LARGEST_TEMPERATURE = 1000.0

Packing = Literal["concatenate", "best_fit"]


class PretrainingData(NamedTuple):
    """Data opened for a run."""

    tokenizer: PreTrainedTokenizerFast
    """Its tokenizer."""
    train_rows: TrainingRows
    """Endless training rows."""
    eval_rows: HeldOutRows
    """Held-out rows."""
    groups: Sequence[Mapping[str, str]]
    """What the loss is told apart by: one entry for each number in `loss_groups` of a batch."""
    fingerprint: dict[str, Any]
    """JSON values that decide the order of the data; a resumed run must have the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedStore:
    """A token store in a mixture."""

    store: Path
    """Folder of the store."""
    rate: float | None = None
    """Its share of the draws, relative to the other rates; null for all stores: by size."""
    max_tokens: int | None = None
    """Where shares go by size: count at most this many of its tokens (T5's limit on large corpora)."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.rate is not None and not 0 < self.rate <= _LARGEST_RATE:
            raise ValueError(
                f"rate: {self.rate} must be positive and at most {_LARGEST_RATE:.0e}; or leave the store out"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens} must be at least 1")
        if self.rate is not None and self.max_tokens is not None:
            raise ValueError("max_tokens: has no effect beside a rate; give one of the two")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreData:
    """Token stores made by `spade-t5 prepare`; the tokenizer lies in them."""

    name: ClassVar[str] = "store"
    is_default: ClassVar[bool] = True

    store: Path | None = None
    """Folder of the store, if it is one."""
    mixture: tuple[MixedStore, ...] = ()
    """Stores to mix, if they are several."""
    temperature: float = 1.0
    """Where shares go by size: the share is size^(1 / temperature), so that above 1 small stores come more often."""
    packing: Packing = "concatenate"
    """concatenate: rows are stretches of the concatenated documents, as in T5; best_fit: whole documents share rows and do not see each
    other, long ones are divided."""
    max_eval_rows: int | None = 256
    """Held-out segments that an evaluation uses, each in a row of its own; null: all."""
    staging_dir: Path | None = None
    """Folder on a disk of each node that stores are copied to before training; null: they are read where they are."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if (self.store is None) == (not self.mixture):
            raise ValueError("store: give either one store or a mixture of stores")
        rates = [entry.rate for entry in self.mixture]
        if None in rates and any(rate is not None for rate in rates):
            raise ValueError("mixture: give every store a rate, or none of them")
        if not 1 <= self.temperature <= _LARGEST_TEMPERATURE:
            raise ValueError(
                f"temperature: {self.temperature} must be at least 1 and at most {_LARGEST_TEMPERATURE:.0f}"
            )
        if self.temperature != 1 and (not self.mixture or rates[0] is not None):
            raise ValueError("temperature: has no effect without a mixture by size; leave it out")
        if self.max_eval_rows is not None and self.max_eval_rows < 1:
            raise ValueError(f"max_eval_rows: {self.max_eval_rows} must be at least 1, or null for all")

    @property
    def stores(self) -> tuple[MixedStore, ...]:
        """The mixture, or the one store as a mixture of one."""
        return self.mixture if self.store is None else (MixedStore(store=self.store),)

    def with_eval_rows(self, max_rows: int | None) -> "StoreData":
        """The same data with another number of held-out segments; None: all."""
        return dataclasses.replace(self, max_eval_rows=max_rows)

    def open(self, objective: ObjectiveConfig, *, seed: int) -> PretrainingData:
        """Opens the stores and lays out training and held-out rows.

        Raises:
            ConfigError: stores, tokenizer and objective do not go together.
            DataError: a store is missing or damaged.
        """
        stores = [self._open_store(entry.store) for entry in self.stores]
        tokenizer = load_tokenizer(stores[0].path / "tokenizer")
        for store in stores:
            store.check_tokenizer(tokenizer_hash(tokenizer))
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        denoisers = objective.bind(vocabulary)
        for store in stores:
            check_documents_end(store, denoisers)
        identities = [store.identity for store in stores]
        for number, identity in enumerate(identities):
            if identity in identities[:number]:
                first = self.stores[identities.index(identity)].store
                raise ConfigError(
                    f"data.mixture: {self.stores[number].store} is the same as {first}; give it once, with the sum of the rates"
                )
        self.check_denoisers(denoisers)
        train, held_out = (self._pairs(stores, split, denoisers) for split in ("train", "validation"))
        draws = SegmentDraws(train, vocabulary, seed=seed)
        train_rows: ConcatenatedRows | PackedRows
        if self.packing == "concatenate":
            train_rows = ConcatenatedRows(draws, vocabulary)
        else:
            train_rows = PackedRows(draws, vocabulary)
            inputs_full, targets_full = train_rows.efficiency(0)
            logger.info(
                "packed by best fit: rows of %d inputs are %.1f %% full, their %d targets %.1f %%",
                train_rows.renderer.inputs_length,
                100 * inputs_full,
                train_rows.renderer.targets_length,
                100 * targets_full,
            )
        return PretrainingData(
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=HeldOutRows(held_out, vocabulary, seed=seed, max_rows=self.max_eval_rows),
            groups=train_rows.renderer.groups,
            fingerprint={
                "stores": identities,
                "packing": self.packing,
                "shares": [sum(pair.weights[0][1] for pair in train if pair.corpus == name) for name in self._names],
            },
        )

    def check_denoisers(self, denoisers: Sequence[BoundDenoiser]) -> None:
        """Fails if these denoisers do not go with the packing.

        Raises:
            ConfigError: naming the setting to change.
        """
        for denoiser in denoisers:
            if self.packing == "concatenate" and not denoiser.has_fixed_lengths:
                raise ConfigError(
                    f"data.packing: concatenate needs rows that every segment fills, and lengths of {denoiser.label} vary; "
                    "use data.packing=best_fit"
                )

    def _open_store(self, path: Path) -> TokenStore:
        return TokenStore.open(path if self.staging_dir is None else stage(path, self.staging_dir))

    def _pairs(self, stores: Sequence[TokenStore], split: str, denoisers: Sequence[BoundDenoiser]) -> list[Pair]:
        segments = [[self._segments(store, split, denoiser) for denoiser in denoisers] for store in stores]
        shares = self._shares(
            [(store.split(split).num_tokens, own[0].count) for store, own in zip(stores, segments, strict=True)]
        )
        return [
            Pair(corpus=name, denoiser=denoiser, segments=one, weights=weights)
            for name, share, own in zip(self._names, shares, segments, strict=True)
            for denoiser, one, weights in zip(denoisers, own, scaled_weights(denoisers, share), strict=True)
        ]

    def _segments(self, store: TokenStore, split: str, denoiser: BoundDenoiser) -> Segments:
        tokens, raw_length = store.split(split), denoiser.lengths.raw
        segments: Segments
        if self.packing == "concatenate":
            segments = ConcatenatedSegments(tokens, raw_length)
        elif raw_length < 2 * denoiser.min_raw_length:
            raise ConfigError(
                f"data.packing: best_fit divides documents into pieces of {raw_length} tokens for {denoiser.label}, and some pieces would "
                f"have fewer than {denoiser.min_raw_length}; lengthen the inputs"
            )
        else:
            segments = DocumentSegments(tokens, raw_length, denoiser.min_raw_length)
        if not segments.count:
            remedy = "prepare more text" if split == "train" else "hold out more (held_out_fraction)"
            raise ConfigError(
                f"data.store: split {split!r} of {store.path} has {tokens.num_tokens} tokens, which is no segment for {denoiser.label}, whose "
                f"inputs of {denoiser.lengths.inputs} tokens take {raw_length}; shorten the inputs, or {remedy}"
            )
        return segments

    def _shares(self, sizes: Sequence[tuple[int, int]]) -> list[float]:
        """Share of each store in the draws: its rate, or its number of segments after the limit, to the power of 1 / temperature."""
        shares = [
            entry.rate or (segments * min(1.0, (entry.max_tokens or tokens) / tokens)) ** (1 / self.temperature)
            for entry, (tokens, segments) in zip(self.stores, sizes, strict=True)
        ]
        return [share / sum(shares) for share in shares]

    @property
    def _names(self) -> list[str]:
        """Names of the corpora in metrics: their folders' names, or whole paths where two folders have the same name."""
        names = [entry.store.name for entry in self.stores]
        return [
            name if names.count(name) == 1 else str(entry.store) for name, entry in zip(names, self.stores, strict=True)
        ]


def check_documents_end(store: TokenStore, denoisers: Sequence[BoundDenoiser]) -> None:
    """Fails if a denoiser wants documents with EOS behind them and the store has none, or the other way about.

    Raises:
        ConfigError: naming the setting that the store must be made with.
    """
    has_eos = bool(store.manifest["settings"]["append_eos"])
    for denoiser in denoisers:
        if denoiser.documents_end_with_eos not in (None, has_eos):
            raise ConfigError(
                f"objective: {denoiser.label} needs a store prepared with append_eos={str(not has_eos).lower()}, {store.path} has "
                f"{str(has_eos).lower()}; prepare the corpus again, or change objective.style"
            )


def scaled_weights(denoisers: Sequence[BoundDenoiser], share: float) -> list[WeightSteps]:
    """Weights of the pairs of one corpus: in every block, the denoisers' weights scaled so that they sum to the corpus's share."""
    starts = sorted({block for denoiser in denoisers for block, _ in denoiser.weights})
    steps = [[weight_at(denoiser.weights, start) for start in starts] for denoiser in denoisers]
    # Where no denoiser has a weight, the order says so.
    totals = [sum(column) or 1.0 for column in zip(*steps, strict=True)]
    return [
        [(start, share * weight / total) for start, weight, total in zip(starts, row, totals, strict=True)]
        for row in steps
    ]

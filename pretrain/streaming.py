"""Text straight from its files, without a token store: the same exact order on any number of ranks, and a cursor of a few numbers a lane.

Slot n of a run is the next segment of lane n mod V (`lanes.py`); the order of draws (`order.py`) says which denoiser it goes to, and so how
long it is, and (seed, n) decides the noise. So slot n depends on nothing but the seed and the files, whoever reads it. Text is mixed by
reading V files at a time, and by nothing else: what a buffer has shuffled cannot be resumed.

With R readers (processes of all ranks), reader q makes the slots n = q mod R, and has to read the lanes those are in: q mod gcd(R, V). If R
divides V, no text is read twice; else readers drop what others make. A reader of a lane knows its state behind every step, so the cursor of
all ranks is, for every lane, the state with the most segments taken.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spade_t5.checkpoint.manifest import content_hash
from spade_t5.data.bad_rows import BadRowLimits
from spade_t5.errors import ConfigError, UserError
from spade_t5.hf.tokenizer import load_tokenizer, tokenizer_hash
from spade_t5.pretrain.corpora import Corpus, CorpusConfig
from spade_t5.pretrain.data import PretrainingData
from spade_t5.pretrain.draws import Drawn, Made, Pair
from spade_t5.pretrain.encoding import TextEncoder, Tokens
from spade_t5.pretrain.lanes import Lane, LaneState, TextStream
from spade_t5.pretrain.objectives import BoundDenoiser, ObjectiveConfig, Vocabulary
from spade_t5.pretrain.order import Ints, Order
from spade_t5.pretrain.rows import HeldOutRows, Renderer, widest
from spade_t5.pretrain.segments import ConcatenatedSegments
from spade_t5.training import distributed
from spade_t5.training.data import Batch, BatchShape, Cursor, StepBatches, checked

logger = logging.getLogger(__name__)

_HUB_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingData:
    """Text of one corpus, tokenised while training; documents run on into each other, as in T5.

    For a first look at a corpus, or one too large to store. `spade-t5 prepare` and a store shuffle all of it, read faster, and have checksums.
    """

    name: ClassVar[str] = "streaming"

    corpus: CorpusConfig
    """Text to train on."""
    tokenizer: str
    """Tokenizer folder, SentencePiece `.model` file, or name of a Hugging Face T5 tokenizer."""
    num_sentinels: int | None = None
    """Append sentinels to the tokenizer up to this number; null keeps what it has."""
    lanes: int = 64
    """Files that are read side by side, which is all the mixing there is. Best a multiple of the number of ranks times `loader_workers`;
    at most the number of files."""
    held_out_fraction: float = 0.005
    """Share of the documents held out for evaluation, chosen by a hash of their text; a corpus with splits of its own keeps them."""
    append_eos: bool = False
    """Put EOS behind each document, as Hugging Face's and nanoT5's scripts do; Google's T5 does not."""
    max_eval_rows: int = 256
    """Held-out segments that an evaluation uses: the first of the corpus, so this many are looked for when the run starts."""
    bad_rows: BadRowLimits = field(default_factory=BadRowLimits)
    """How much of the rows that a lane reads may be bad."""
    strict: bool = False
    """Stop at the first bad row instead of leaving it out."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("num_sentinels", "lanes", "max_eval_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: {self.held_out_fraction} must lie between 0 and 1")

    def with_eval_rows(self, max_rows: int | None) -> "StreamingData":
        """The same data with another number of held-out segments; None: as many as before."""
        return self if max_rows is None else dataclasses.replace(self, max_eval_rows=max_rows)

    def open(self, objective: ObjectiveConfig, *, seed: int) -> PretrainingData:
        """Finds the files and the held-out segments.

        Raises:
            ConfigError: corpus, tokenizer and objective do not go together.
            DataError: the corpus cannot be had, or too many of its rows are bad.
        """
        tokenizer = load_tokenizer(self.tokenizer, num_sentinels=self.num_sentinels)
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        denoisers = objective.bind(vocabulary)
        self.check_denoisers(denoisers)
        corpus = self.corpus.open()
        self._check_pinned(corpus)
        if self.lanes > len(corpus.files):
            raise ConfigError(
                f"data.lanes: {self.lanes} lanes and {len(corpus.files)} files, but no file is in two lanes; set data.lanes="
                f"{len(corpus.files)} or fewer, or divide the corpus into more files"
            )
        stream = TextStream(
            corpus=corpus,
            encoder=TextEncoder(tokenizer, append_eos=self.append_eos),
            lanes=self.lanes,
            held_out_fraction=self.held_out_fraction,
            seed=seed,
            bad_rows=self.bad_rows,
            strict=self.strict,
        )
        pairs = self._pairs(stream, denoisers)
        train_rows = StreamingRows(stream, pairs, vocabulary, seed=seed)
        return PretrainingData(
            tokenizer=tokenizer,
            train_rows=train_rows,
            eval_rows=HeldOutRows(pairs, vocabulary, seed=seed, max_rows=self.max_eval_rows),
            groups=train_rows.renderer.groups,
            fingerprint={
                "num_files": len(corpus.files),
                "num_bytes": sum(file.num_bytes or 0 for file in corpus.files),
                "corpus": content_hash(corpus.fingerprint),
                "tokenizer": tokenizer_hash(tokenizer),
                "lanes": self.lanes,
                "held_out_fraction": self.held_out_fraction,
                "append_eos": self.append_eos,
                "weights": [[list(step) for step in pair.weights] for pair in pairs],
            },
        )

    def _check_pinned(self, corpus: Corpus) -> None:
        """A stream goes on from lines of files, so what a name on the hub stands for must not move between two starts."""
        commits = {found[1] for file in corpus.files if (found := _HUB_COMMIT.search(file.name))}
        revision = getattr(self.corpus, "revision", None)
        if commits and revision not in commits:
            raise ConfigError(
                f"data.corpus.revision: {revision or 'null'} may be another commit when the run goes on; set it to the commit that it is "
                f"now, data.corpus.revision={min(commits)}"
            )

    def check_denoisers(self, denoisers: Sequence[BoundDenoiser]) -> None:
        """Fails if these denoisers do not go with a stream, or with the end of its documents.

        Raises:
            ConfigError: naming the setting to change.
        """
        for denoiser in denoisers:
            if not denoiser.has_fixed_lengths:
                raise ConfigError(
                    f"data.name: streaming fills rows with one segment each, and lengths of {denoiser.label} vary; prepare a store and "
                    "use data.packing=best_fit"
                )
            if denoiser.documents_end_with_eos not in (None, self.append_eos):
                raise ConfigError(
                    f"data.append_eos: {str(self.append_eos).lower()} does not go with {denoiser.label}; set data.append_eos="
                    f"{str(not self.append_eos).lower()}, or change objective.style"
                )

    def _pairs(self, stream: TextStream, denoisers: Sequence[BoundDenoiser]) -> list[Pair]:
        longest = max(denoiser.lengths.raw for denoiser in denoisers)
        held_out = HeldOutText(stream.held_out_tokens(self.max_eval_rows * longest))
        if held_out.num_tokens < longest:
            raise ConfigError(
                f"data.held_out_fraction: the held-out documents have {held_out.num_tokens} tokens, a row takes {longest}; hold out more, "
                "or shorten objective.inputs_length"
            )
        return [
            Pair(
                corpus=self.corpus.name,
                denoiser=denoiser,
                segments=ConcatenatedSegments(held_out, denoiser.lengths.raw),
                weights=denoiser.weights,
            )
            for denoiser in denoisers
        ]


class HeldOutText:
    """Held-out tokens in memory, to be cut into segments like the split of a store."""

    path, name = "streaming", "validation"

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self.num_tokens = len(tokens)

    def gather(self, starts: Ints, lengths: Ints) -> Tokens:
        """Stretches of the tokens, end to end."""
        return np.concatenate(
            [self._tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        )


class StepPart(NamedTuple):
    """What one reader adds to one step of its rank."""

    made: list[list[Made]]
    """Examples for each micro-batch; their places are rows of it."""
    lanes: list[int]
    """Lanes that were read."""
    states: list[LaneState]
    """Their states behind the step."""


class StreamingRows:
    """Row n is slot n of a text stream: endless training rows, each filled by one segment.

    Args:
        stream: the text.
        pairs: the corpus with each denoiser; their segments are not used.
        vocabulary: of the denoisers.
        seed: seed of draws and noise.
    """

    def __init__(self, stream: TextStream, pairs: Sequence[Pair], vocabulary: Vocabulary, *, seed: int) -> None:
        self.stream, self.pairs, self.seed = stream, pairs, seed
        self.order = Order(seed, [pair.weights for pair in pairs], labels=[pair.label for pair in pairs])
        self.raw_lengths = np.array([pair.denoiser.lengths.raw for pair in pairs])
        self.renderer = Renderer(pairs, vocabulary, *widest(pairs))

    def steps(
        self, cursor: Cursor | None, num_steps: int, shape: BatchShape, *, first_step: int = 1
    ) -> Generator[StepBatches, None, None]:
        """See `TrainingRows`."""
        numbers = range(first_step, first_step + num_steps)
        slot = 0 if cursor is None else int(cursor["slot"])
        lanes = [LaneState()] * self.stream.lanes if cursor is None else [LaneState(*lane) for lane in cursor["lanes"]]
        if shape.rank == 0:
            self._warn_of_waste(_num_readers(shape))
        reader = _Reader(self, slot, lanes, numbers, shape)
        loader = iter(
            DataLoader(
                reader,
                batch_size=None,
                num_workers=shape.workers,
                collate_fn=_unchanged,
                worker_init_fn=functools.partial(distributed.begin_worker, os.getpid()),
            )
        )
        try:
            for step in numbers:
                made: list[list[Made]] = [[] for _ in range(shape.num_micro_batches_of(step))]
                for _ in range(max(shape.workers, 1)):
                    part = next(loader)
                    if isinstance(part, UserError):
                        raise part
                    for micro_batch, more in zip(made, part.made, strict=True):
                        micro_batch += more
                    for lane, state in zip(part.lanes, part.states, strict=True):
                        lanes[lane] = max(lanes[lane], state, key=_taken)
                slot += shape.rows_of(step)
                yield StepBatches(
                    [self._render(micro_batch, shape.micro_rows) for micro_batch in made],
                    {"slot": slot, "lanes": [list(lane) for lane in lanes]},
                )
        finally:
            # Closes it now. Collected later, in a cycle with a traceback, it could not reach its workers and would wait for them in vain.
            del loader

    def merge_cursors(self, cursors: Sequence[Cursor]) -> Cursor:
        """For each lane the state of the rank that read furthest in it."""
        lanes = zip(*(cursor["lanes"] for cursor in cursors), strict=True)
        return {"slot": cursors[0]["slot"], "lanes": [max(states, key=_taken) for states in lanes]}

    def make(self, pair: int, places: Ints, slots: Ints, segments: Sequence[Tokens]) -> Made:
        """Inputs and targets of segments that go to one denoiser."""
        lengths = np.full(len(slots), self.raw_lengths[pair])
        examples = self.pairs[pair].denoiser.corrupt_documents(np.concatenate(segments), lengths, slots, seed=self.seed)
        return Made(Drawn(pair, places, slots, slots), examples)

    def _warn_of_waste(self, num_readers: int) -> None:
        if self.stream.lanes % num_readers:
            logger.warning(
                "data.lanes: %d lanes are no multiple of the %d readers (ranks times loader_workers), so text is tokenised more than once",
                self.stream.lanes,
                num_readers,
            )

    def _render(self, made: list[Made], num_rows: int) -> Batch:
        num_filled = sum(len(one.drawn.places) for one in made)
        batch = checked(self.renderer.render(made, np.arange(num_filled), num_rows))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch


class _Reader(IterableDataset[StepPart | UserError]):
    """The parts of one reader, step after step; which reader it is depends on the process that it finds itself in."""

    def __init__(
        self, rows: StreamingRows, slot: int, lanes: Sequence[LaneState], steps: range, shape: BatchShape
    ) -> None:
        self.rows, self.slot, self.lanes, self.steps, self.shape = rows, slot, list(lanes), steps, shape

    def __iter__(self) -> Iterator[StepPart | UserError]:
        worker = get_worker_info()
        number = self.shape.rank + self.shape.world_size * (worker.id if worker else 0)
        try:
            yield from self._parts(number, _num_readers(self.shape))
        except UserError as error:
            # Raised in a worker it would reach the user as a traceback.
            yield error

    def _parts(self, number: int, num_readers: int) -> Iterator[StepPart]:
        shape, num_lanes = self.shape, len(self.lanes)
        every = math.gcd(num_readers, num_lanes)
        lanes = {
            lane: Lane(self.rows.stream, lane, self.lanes[lane]) for lane in range(number % every, num_lanes, every)
        }
        first_slot = self.slot
        for step in self.steps:
            slots = first_slot + np.arange(shape.rows_of(step))
            first_slot += len(slots)
            pairs = self.rows.order.draws(slots).pair
            rank_slots = slots[slots % shape.world_size == shape.rank]
            segments: dict[int, Tokens] = {}
            was_read = slots % every == number % every
            for slot, length in zip(slots[was_read], self.rows.raw_lengths[pairs[was_read]], strict=True):
                segments[slot] = lanes[slot % num_lanes].take(length)
            made = []
            for first in range(0, shape.num_micro_batches_of(step) * shape.micro_rows, shape.micro_rows):
                micro_slots = rank_slots[first : first + shape.micro_rows]
                micro_pairs = pairs[micro_slots - slots[0]]
                is_own = micro_slots % num_readers == number
                made.append(
                    [
                        self.rows.make(pair, places, micro_slots[places], [segments[n] for n in micro_slots[places]])
                        for pair in np.unique(micro_pairs[is_own]).tolist()
                        for places in [np.flatnonzero(is_own & (micro_pairs == pair))]
                    ]
                )
            moved = sorted({int(slot % num_lanes) for slot in segments})
            yield StepPart(made, moved, [lanes[lane].state for lane in moved])


def _num_readers(shape: BatchShape) -> int:
    return shape.world_size * max(shape.workers, 1)


def _taken(state: Sequence[int]) -> int:
    return state[LaneState._fields.index("taken")]


def _unchanged(part: Any) -> Any:
    return part

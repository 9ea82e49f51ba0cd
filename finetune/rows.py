"""From examples to the numbered rows that the engine trains on.

Examples are tokenised once and kept in memory. A row holds one example or, packed, several, told apart by segment ids, which
changes neither their logits nor the summed loss. Training rows never end: every epoch visits all rows in an order that is a
pure function of (seed, epoch), so a resumed run goes on exactly where it stopped.

What is too long is cut by a rule that the config names (by default a source keeps its beginning), keeps its end mark, and is
counted and logged.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spade_t5.data import packing
from spade_t5.data.packing import TruncationRule, render, render_inputs, render_labels, truncate
from spade_t5.finetune.task import Example, Task
from spade_t5.training.data import ABSENT, EMPTY_ROW, Batch, NumberedRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsConfig:
    """How long texts may be and how they share rows."""

    max_source_tokens: int | None = None
    """Longest source, in tokens with the end mark. Null: the task's own limit."""
    max_target_tokens: int | None = None
    """Longest target and longest generated text, in tokens with the end mark. Null: the task's own limit."""
    truncation: TruncationRule = "head"
    """What is kept of a source that is too long: its head, its tail, or half of each. Targets keep their head."""
    packing: bool = True
    """Put several examples into a row."""
    row_tokens: int | None = None
    """Room for sources, and as much for targets, in a packed row, in tokens. Null: the longest source allowed."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("max_source_tokens", "max_target_tokens", "row_tokens"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}: {value} must be at least 2, a token and the end mark")


@dataclass(frozen=True, slots=True)
class EncodedExamples:
    """The examples of a split as token ids."""

    sources: list[list[int]]
    """Source token ids, end mark included."""
    targets: list[list[int]]
    """Target token ids, end mark included."""
    labels: list[float] | None
    """Class index, or value of a regression, of each example; None for generation tasks."""
    num_cut_sources: int
    """Sources that were longer than allowed."""
    num_cut_targets: int
    """Targets that were longer than allowed."""

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.sources)

    def compute_fingerprint(self) -> str:
        """Hash of the examples in their order, over all of them; a resumed run must have the same."""
        digest = hashlib.sha256()
        for texts in (self.sources, self.targets):
            digest.update(np.array([len(texts), *map(len, texts)], dtype="<i8").tobytes())
            for tokens in texts:
                digest.update(np.array(tokens, dtype="<i4").tobytes())
        if self.labels is not None:
            digest.update(np.array(self.labels, dtype="<f8").tobytes())
        return digest.hexdigest()


def encode_examples(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: RowsConfig
) -> EncodedExamples:
    """Tokenises sources and targets and cuts them to their limits."""
    max_source = config.max_source_tokens or task.max_source_tokens
    max_target = config.max_target_tokens or task.max_target_tokens
    sources, cut_sources = _encode([e.source for e in examples], tokenizer, max_source, config.truncation)
    targets, cut_targets = _encode([e.target for e in examples], tokenizer, max_target, "head")
    for side, count, limit in (("sources", cut_sources, max_source), ("targets", cut_targets, max_target)):
        if count:
            logger.warning("task %s: %d of %d %s cut to %d tokens", task.name, count, len(examples), side, limit)
    labels = None if task.kind == "generation" else [float(e.reference) for e in examples]
    return EncodedExamples(sources, targets, labels, cut_sources, cut_targets)


def pack_examples(examples: EncodedExamples, *, row_tokens: int, seed: int) -> list[list[int]]:
    """Shares examples out over rows with room for `row_tokens` source and as many target tokens.

    Best fit within windows of a shuffled order, so that which examples share a row says nothing about the order of the data.

    Returns:
        The numbers of the examples in each row; a pure function of the arguments.
    """
    order = epoch_order(seed, 0, len(examples)).tolist()
    lengths = [(len(examples.sources[i]), len(examples.targets[i])) for i in order]
    room = max(row_tokens, *(max(pair) for pair in lengths))
    packed = packing.pack(lengths, inputs_length=room, targets_length=room)
    logger.info(
        "packed %d examples into %d rows of %d tokens, %.1f %% full",
        len(order),
        len(packed.rows),
        room,
        100 * packed.inputs_efficiency,
    )
    return [[order[i] for i in row] for row in packed.rows]


class ExampleRows(NumberedRows):
    """Rows of encoded examples: an endless source for training, a finite one for evaluation."""

    def __init__(
        self,
        examples: EncodedExamples,
        rows: Sequence[Sequence[int]],
        *,
        pad_token_id: int,
        num_outputs: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        """Numbers the rows.

        Args:
            examples: what the rows are made of.
            rows: the numbers of the examples in each row.
            pad_token_id: fills up `input_ids`.
            num_outputs: outputs of an encoder head (1: regression), whose labels are one for each document; None: the
                labels are target tokens.
            shuffle_seed: makes the source endless, every epoch in its own order; None: each row once, in order.

        Raises:
            ValueError: a head is asked for and the examples have no labels.
        """
        if num_outputs is not None and examples.labels is None:
            raise ValueError("num_outputs: a generation task has no class index or value to train a head on")
        self.examples = examples
        self.rows = rows
        self.pad_token_id = pad_token_id
        self.num_outputs = num_outputs
        self.shuffle_seed = shuffle_seed
        self.num_rows = len(rows) if shuffle_seed is None else None

    def collate(self, row_numbers: Sequence[int]) -> Batch:
        """The batch of these rows, padded to its longest row; row -1 is padding alone."""
        rows = [self._row(number) for number in row_numbers]
        sources = [[self.examples.sources[i] for i in row] for row in rows]
        if self.num_outputs is not None:
            inputs = render_inputs(sources, length=_longest(sources), pad_token_id=self.pad_token_id)
            return {**inputs, "labels": self._document_labels(rows), "sample_numbers": _sample_numbers(rows)}
        targets = [[self.examples.targets[i] for i in row] for row in rows]
        batch = render(
            [list(map(packing.Example, *sides)) for sides in zip(sources, targets, strict=True)],
            inputs_length=_longest(sources),
            targets_length=_longest(targets),
            pad_token_id=self.pad_token_id,
        )
        return {**batch, "sample_numbers": _sample_numbers(rows)}

    def _row(self, number: int) -> Sequence[int]:
        if number == EMPTY_ROW:
            return ()
        if self.shuffle_seed is None:
            return self.rows[number]
        epoch, place = divmod(number, len(self.rows))
        # epoch 0 is the order that packing starts from
        return self.rows[epoch_order(self.shuffle_seed, 1 + epoch, len(self.rows))[place]]

    def _document_labels(self, rows: Sequence[Sequence[int]]) -> Tensor:
        values = self.examples.labels
        assert values is not None, "checked at construction"
        return render_labels(
            [[values[i] for i in row] for row in rows],
            max_documents=max(1, *(len(row) for row in rows)),
            regression=self.num_outputs == 1,
        )


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of `count` things in an epoch: a pure function of its arguments, equal on every rank and in every worker."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int, rule: TruncationRule
) -> tuple[list[list[int]], int]:
    ids: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [truncate(tokens, limit, rule, eos_token_id=eos) for tokens in ids], sum(
        len(tokens) > limit for tokens in ids
    )


def _sample_numbers(rows: Sequence[Sequence[int]]) -> Tensor:
    numbers = torch.full((len(rows), max(1, *map(len, rows))), ABSENT)
    for i, row in enumerate(rows):
        numbers[i, : len(row)] = torch.tensor(row)
    return numbers


def _longest(rows: Sequence[Sequence[Sequence[int]]]) -> int:
    return max(1, *(sum(map(len, row)) for row in rows))

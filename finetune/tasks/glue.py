"""GLUE (arXiv:1804.07461) in T5's text form: SST-2, MRPC, STS-B and RTE.

Prompts, label words and the rounding of STS-B's targets are T5's (arXiv:1910.10683, appendix D). Scores are GLUE's own,
and so are the references: STS-B is scored against the unrounded values. Rows come from the hub or from the folders of the
original download (`SST-2/train.tsv` and so on, also packed as `.gz`).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from spade_t5.errors import DataError
from spade_t5.finetune.sources import FolderSource, HubSource
from spade_t5.finetune.task import (
    Example,
    Prediction,
    Row,
    Task,
    TaskKind,
    class_index,
    field,
    joined_prompt,
    text_field,
    word_to_class,
)
from spade_t5.messages import shown

UNKNOWN_VALUE = -1.0  # what T5 takes for generated text that is no number
MAX_SIMILARITY = 5.0
MAX_TARGET_TOKENS = 16  # more than the longest label word takes in any usual vocabulary
GLUE_FILES = {"train": "train.tsv", "validation": "dev.tsv"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GlueTask:
    """A classification task of GLUE; a subclass for each names its columns and labels."""

    name: ClassVar[str]
    """T5's name of the task, which is also its configuration on the hub."""
    kind: ClassVar[TaskKind] = "classification"
    """What is predicted."""
    folder: ClassVar[str]
    """Name of its folder in the original download."""
    columns: ClassVar[dict[str, str]]
    """T5's name of each text, which is also the hub's column, to the column in the original table."""
    label_column: ClassVar[str] = "label"
    """Label column of the original table; the hub calls it `label`."""
    table_labels: ClassVar[tuple[str, ...]] = ("0", "1")
    """Labels in the original table, in class order; the hub has the class index."""
    label_words: ClassVar[tuple[str, ...]]
    """T5's word for each class."""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    """GLUE's metrics."""
    source: HubSource | FolderSource = dataclasses.field(default_factory=partial(HubSource, dataset="nyu-mll/glue"))
    """The hub, or the folder that holds `SST-2/`, `MRPC/` and so on."""

    def build(self) -> Task:
        """The task over this source."""
        return Task(
            name=self.name,
            kind=self.kind,
            splits={split: partial(self._rows, split) for split in GLUE_FILES},
            to_example=self._to_example,
            metrics=self.metrics,
            label_words=self.label_words,
            postprocess=self._postprocess,
            max_source_tokens=512,
            max_target_tokens=MAX_TARGET_TOKENS,
        )

    def _rows(self, split: str) -> Iterator[Row]:
        if isinstance(self.source, HubSource):
            yield from self.source.rows(split, subset=self.name)
            return
        for row in self.source.rows(f"{self.folder}/{GLUE_FILES[split]}"):
            fields = {name: field(row, column) for name, column in self.columns.items()}
            yield Row({**fields, "label": field(row, self.label_column)}, row.origin)

    def _source_text(self, row: Row) -> str:
        return joined_prompt(self.name, {name: text_field(row, name) for name in self.columns})

    def _to_example(self, row: Row) -> Example:
        value = field(row, "label")
        allowed = self.table_labels if isinstance(value, str) else range(len(self.label_words))
        label = class_index(value, allowed, row, self.name)
        return Example(source=self._source_text(row), target=self.label_words[label], reference=label)

    def _postprocess(self, text: str) -> Prediction:
        return word_to_class(self.label_words, text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sst2(GlueTask):
    """Sentiment of a phrase or sentence of a film review."""

    name: ClassVar[str] = "sst2"
    folder: ClassVar[str] = "SST-2"
    columns: ClassVar[dict[str, str]] = {"sentence": "sentence"}
    label_words: ClassVar[tuple[str, ...]] = ("negative", "positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mrpc(GlueTask):
    """Whether two sentences say the same."""

    name: ClassVar[str] = "mrpc"
    folder: ClassVar[str] = "MRPC"
    columns: ClassVar[dict[str, str]] = {"sentence1": "#1 String", "sentence2": "#2 String"}
    label_column: ClassVar[str] = "Quality"
    label_words: ClassVar[tuple[str, ...]] = ("not_equivalent", "equivalent")
    metrics: ClassVar[tuple[str, ...]] = ("f1", "accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rte(GlueTask):
    """Whether the second sentence follows from the first."""

    name: ClassVar[str] = "rte"
    folder: ClassVar[str] = "RTE"
    columns: ClassVar[dict[str, str]] = {"sentence1": "sentence1", "sentence2": "sentence2"}
    table_labels: ClassVar[tuple[str, ...]] = ("entailment", "not_entailment")
    label_words: ClassVar[tuple[str, ...]] = ("entailment", "not_entailment")


@dataclass(frozen=True, kw_only=True, slots=True)
class StsB(GlueTask):
    """How similar two sentences are, from 0 to 5; its label words are T5's 26 values in steps of 0.2."""

    name: ClassVar[str] = "stsb"
    kind: ClassVar[TaskKind] = "regression"
    folder: ClassVar[str] = "STS-B"
    columns: ClassVar[dict[str, str]] = {"sentence1": "sentence1", "sentence2": "sentence2"}
    label_column: ClassVar[str] = "score"
    label_words: ClassVar[tuple[str, ...]] = tuple(f"{i / 5:.1f}" for i in range(26))
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    def _to_example(self, row: Row) -> Example:
        value = field(row, "label")
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= MAX_SIMILARITY:
            raise DataError(f"{row.origin}: label {shown(value)} is outside the task {self.name}; allowed: 0 to 5")
        return Example(source=self._source_text(row), target=similarity_text(score), reference=score)

    def _postprocess(self, text: str) -> Prediction:
        return text_to_value(text)


def similarity_text(score: float) -> str:
    """T5's target text of a similarity: rounded to a fifth, with one decimal.

    >>> similarity_text(3.667), similarity_text(5)
    ('3.6', '5.0')
    """
    return f"{round(score * 5) / 5:.1f}"


def text_to_value(text: str) -> float:
    """Generated text to a number, `UNKNOWN_VALUE` if it is none."""
    try:
        value = float(text)
    except ValueError:
        return UNKNOWN_VALUE
    return value if math.isfinite(value) else UNKNOWN_VALUE

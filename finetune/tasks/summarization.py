"""Summarization in T5's text form, `summarize: document` -> summary: CNN/DailyMail, SciSumm, and the user's own files.

Scored by ROUGE-1, 2, L and Lsum. For Lsum, predictions and references are written with one sentence on each line, both by
the same rule, and saved that way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from spade_t5.finetune.metrics import sentence_per_line
from spade_t5.finetune.sources import SPLITS, FilesSource, HubSource
from spade_t5.finetune.task import Example, Row, Task, text_field

PROMPT = "summarize: "
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True, kw_only=True, slots=True)
class CnnDailymail:
    """News articles and their highlights."""

    name: ClassVar[str] = "cnn-dailymail"
    source: HubSource | FilesSource = field(default_factory=partial(HubSource, dataset="abisee/cnn_dailymail"))
    """The hub, or files whose rows have `article` and `highlights` (one highlight on each line)."""

    def build(self) -> Task:
        """The task over this source."""
        return summarization_task(
            self.name,
            split_readers(self.source, subset="3.0.0"),
            document_field="article",
            summary_field="highlights",
            max_source_tokens=1024,
            max_target_tokens=160,
            lead_sentences=3,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SciSumm:
    """Papers of the ACL Anthology (ScisummNet 2019) without their abstract, and their abstract or human summary."""

    name: ClassVar[str] = "scisumm"
    source: FilesSource
    """Files whose rows have `document`, `abstract` and `summary`."""
    target: Literal["abstract", "summary"] = "abstract"
    """What to write; the other one is never shown, since a human summary repeats most of the abstract."""

    def build(self) -> Task:
        """The task over this source."""
        return summarization_task(
            self.name,
            split_readers(self.source),
            document_field="document",
            summary_field=self.target,
            max_source_tokens=8192,
            max_target_tokens=384,
            lead_sentences=6,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Summarization:
    """Any documents with summaries."""

    name: ClassVar[str] = "summarization"
    source: FilesSource | HubSource
    """Where the rows are."""
    document_field: str = "document"
    """Column of the text to summarize."""
    summary_field: str = "summary"
    """Column of its summary."""
    max_source_tokens: int = 4096
    """Default limit of the document, in tokens."""
    max_target_tokens: int = 256
    """Default limit of the summary, in tokens."""
    lead_sentences: int = 3
    """Sentences of the lead baseline; 0: none."""

    def build(self) -> Task:
        """The task over this source."""
        return summarization_task(
            self.name,
            split_readers(self.source),
            document_field=self.document_field,
            summary_field=self.summary_field,
            max_source_tokens=self.max_source_tokens,
            max_target_tokens=self.max_target_tokens,
            lead_sentences=self.lead_sentences,
        )


def split_readers(source: HubSource | FilesSource, subset: str | None = None) -> dict[str, Callable[[], Iterable[Row]]]:
    """The reader of every split that a source may have."""
    if isinstance(source, HubSource):
        return {split: partial(source.rows, split, subset=subset) for split in SPLITS}
    return {split: partial(source.rows, split) for split in SPLITS}


def summarization_task(
    name: str,
    splits: dict[str, Callable[[], Iterable[Row]]],
    *,
    document_field: str,
    summary_field: str,
    max_source_tokens: int,
    max_target_tokens: int,
    lead_sentences: int,
) -> Task:
    """A task that writes the column `summary_field` of a row from its column `document_field`."""

    def to_example(row: Row) -> Example:
        summary = text_field(row, summary_field)
        source = PROMPT + text_field(row, document_field)
        return Example(source=source, target=summary, reference=sentence_per_line(summary))

    return Task(
        name=name,
        kind="generation",
        splits=splits,
        to_example=to_example,
        metrics=ROUGE,
        postprocess=sentence_per_line,
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        prompt=PROMPT,
        lead_sentences=lead_sentences,
    )

"""Classification of the user's own rows: any text columns, any labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spade_t5.finetune.sources import FilesSource, HubSource
from spade_t5.finetune.task import (
    Example,
    Prediction,
    Row,
    Task,
    class_index,
    field,
    joined_prompt,
    text_field,
    word_to_class,
)
from spade_t5.finetune.tasks.summarization import split_readers


@dataclass(frozen=True, kw_only=True, slots=True)
class TextClassification:
    """Rows of a file or of the hub with text and a label."""

    name: ClassVar[str] = "text-classification"
    source: FilesSource | HubSource
    """Where the rows are."""
    labels: tuple[str, ...]
    """The labels as the data writes them (a number without quotes likewise), in class order."""
    label_words: tuple[str, ...] = ()
    """The words the model writes for them; empty: the labels themselves."""
    text_fields: tuple[str, ...] = ("text",)
    """Columns that the model reads, in this order."""
    label_field: str = "label"
    """Column of the label."""
    prompt: str = "classify"
    """First word of every source text."""
    max_source_tokens: int = 512
    """Default limit of the source, in tokens."""
    max_target_tokens: int = 32
    """Default limit of the label word, in tokens."""

    def __post_init__(self) -> None:
        """Checks the fields against each other."""
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: {list(self.labels)} must be at least two, all different")
        words = self.label_words
        if words and (len(words) != len(self.labels) or len({word.strip() for word in words}) != len(words)):
            raise ValueError(
                f"label_words: {list(words)} must be as many as labels ({len(self.labels)}), all different"
            )
        if not self.text_fields:
            raise ValueError("text_fields: must name at least one column")

    def build(self) -> Task:
        """The task over these rows."""
        words = self.label_words or self.labels
        return Task(
            name=self.name,
            kind="classification",
            splits=split_readers(self.source),
            to_example=self._to_example,
            metrics=("accuracy", "f1_macro"),
            label_words=words,
            postprocess=self._postprocess,
            max_source_tokens=self.max_source_tokens,
            max_target_tokens=self.max_target_tokens,
        )

    def _to_example(self, row: Row) -> Example:
        value = field(row, self.label_field)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        label = class_index(value, self.labels, row, self.name)
        words: Sequence[str] = self.label_words or self.labels
        source = joined_prompt(self.prompt, {name: text_field(row, name) for name in self.text_fields})
        return Example(source=source, target=words[label], reference=label)

    def _postprocess(self, text: str) -> Prediction:
        return word_to_class(self.label_words or self.labels, text)

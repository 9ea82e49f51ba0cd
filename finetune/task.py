"""The task adapter: one object that both trains and evaluates a task.

A task turns rows of a data set into source and target text (text-to-text, T5 arXiv:1910.10683) and into a class index or
a value (encoder head), and turns model output back into something its metrics understand. The shape follows seqio's
`Task` (source, preprocessors, postprocessor, metrics; arXiv:2203.17189). Tokenisation and batches live in `rows.py`,
metrics in `metrics.py`, the adapters themselves in `tasks/`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spade_t5.errors import ConfigError, DataError
from spade_t5.messages import one_line, shown

Prediction = int | float | str
TaskKind = Literal["classification", "regression", "generation"]

UNKNOWN_CLASS = -1  # generated text that is none of the label words; never equal to a reference


@dataclass(frozen=True, slots=True)
class Row:
    """One row as a source of rows delivers it."""

    fields: Mapping[str, Any]
    """Column name to value."""
    origin: str
    """Where the row stands, for messages: `dev.tsv.gz line 14`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as the task sees it."""

    source: str
    """Input text, prompt included."""
    target: str
    """Target text of text-to-text mode."""
    reference: Prediction
    """What predictions are scored against: class index, value, or text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set, its text form and its scores."""

    name: str
    """Name in configs, in file names and on the command line."""
    kind: TaskKind
    """What a prediction is: a class index, a number, or text."""
    splits: Mapping[str, Callable[[], Iterable[Row]]]
    """Rows of every split, read anew at each call."""
    to_example: Callable[[Row], Example]
    """Row to text and reference; raises DataError for a label outside the task."""
    metrics: tuple[str, ...]
    """Names in `metrics.METRICS`; their mean is the task's score."""
    label_words: tuple[str, ...] = ()
    """Texts that compete in likelihood scoring: the classes in index order, or the values of a regression."""
    postprocess: Callable[[str], Prediction] = str.strip
    """Generated text to prediction."""
    max_source_tokens: int
    """Default limit of the source, in tokens, end mark included."""
    max_target_tokens: int
    """Default limit of the target and of generation, in tokens, end mark included."""
    prompt: str = ""
    """Text before the document of a generation task; the lead baseline removes it."""
    lead_sentences: int = 0
    """Sentences of the document that the lead baseline of a generation task takes; 0: no such baseline."""

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of a split, all of them if None, in the order of the data.

        Raises:
            ConfigError: the task has no such split.
            DataError: the split is empty, or a row has a label outside the task.
        """
        if split not in self.splits:
            raise ConfigError(f"task {self.name} has no split {split!r}; it has: {', '.join(self.splits)}")
        examples: list[Example] = []
        for row in self.splits[split]():
            if limit is not None and len(examples) >= limit:
                break
            examples.append(self.to_example(row))
        if not examples:
            raise DataError(f"task {self.name}: split {split!r} holds no rows")
        return examples

    @property
    def num_outputs(self) -> int:
        """Width of an encoder head: the number of classes, 1 for a regression.

        Raises:
            ConfigError: the task is a generation task, which has no encoder head.
        """
        if self.kind == "generation":
            raise ConfigError(f"task {self.name} generates text: use mode text-to-text, not encoder-head")
        return len(self.label_words) if self.kind == "classification" else 1


def class_index(value: object, allowed: Sequence[object], row: Row, task: str) -> int:
    """Position of a label among the allowed ones.

    Raises:
        DataError: the label is none of them; names the row, the value and the allowed labels.
    """
    # type is compared too, since True == 1 and 1.0 == 1 would let foreign labels through
    for index, label in enumerate(allowed):
        if type(value) is type(label) and value == label:
            return index
    labels = ", ".join(repr(label) for label in allowed)
    raise DataError(f"{row.origin}: label {shown(value)} is outside the task {task}; allowed: {labels}")


def field(row: Row, name: str) -> Any:
    """Value of a column.

    Raises:
        DataError: the row has no such column.
    """
    if name not in row.fields:
        raise DataError(
            f"{row.origin}: no field {name!r}; the row has: {one_line(', '.join(map(str, row.fields)), max_bytes=400)}"
        )
    return row.fields[name]


def text_field(row: Row, name: str) -> str:
    """Value of a column that must be text, without blanks at its ends.

    Raises:
        DataError: the row has no such column, or its value is not text.
    """
    value = field(row, name)
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: field {name!r} is {type(value).__name__}, expected text")
    return value.strip()


def joined_prompt(name: str, parts: Mapping[str, str]) -> str:
    """T5's source text of a classification task: the task, then each field after its name.

    >>> joined_prompt("mrpc", {"sentence1": "A cat sat.", "sentence2": "A cat was sitting."})
    'mrpc sentence1: A cat sat. sentence2: A cat was sitting.'
    """
    return " ".join([name, *(f"{key}: {text}" for key, text in parts.items())]).strip()


def word_to_class(label_words: Sequence[str], text: str) -> int:
    """Class index of generated text, `UNKNOWN_CLASS` if it is no label word."""
    word = text.strip()
    return label_words.index(word) if word in label_words else UNKNOWN_CLASS

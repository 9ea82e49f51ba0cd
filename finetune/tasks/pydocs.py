"""Tasks over `pydocs`, the documentation that any Python installation holds: no download, real English.

- `pydocs-summary`: the body of a docstring -> its first line (PEP 257 makes that a summary).
- `pydocs-topic`: a docstring -> the package it documents.
- `pydocs-match`: does this summary belong to this body?

Summary and match evaluate on packages held out as in pretraining, so that no model has read them before. The labels of topic
are packages, so there docstrings are held out inside each package, by a hash of their text.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar

from spade_t5.data.pydocs import STANDARD_LIBRARY, PyDoc, Split, read_pydocs, split_of
from spade_t5.errors import DataError
from spade_t5.finetune.metrics import sentence_per_line
from spade_t5.finetune.task import Example, Row, Task, joined_prompt, word_to_class
from spade_t5.finetune.tasks.summarization import PROMPT, ROUGE

PYDOC_SPLITS: tuple[Split, ...] = ("train", "validation")
HELD_OUT_BYTES = 26  # of 256: about a tenth
MATCH_WORDS = ("no_match", "match")
MIN_BODY_WORDS = 5  # fewer are a bare heading or a link: nothing to summarize or to match


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsSummary:
    """The first line of a docstring from its body."""

    name: ClassVar[str] = "pydocs-summary"
    packages: tuple[str, ...] = (STANDARD_LIBRARY, "numpy", "scipy", "sklearn", "torch")
    """Installed packages, or `stdlib`, whose docstrings are used; empty: all."""
    cache_dir: Path | None = None
    """Folder that keeps parsed docstrings; null: parse them anew."""

    def build(self) -> Task:
        """The task over these packages."""
        return Task(
            name=self.name,
            kind="generation",
            splits={split: partial(self._rows, split) for split in PYDOC_SPLITS},
            to_example=self._to_example,
            metrics=ROUGE,
            postprocess=sentence_per_line,
            max_source_tokens=256,
            max_target_tokens=48,
            prompt=PROMPT,
            lead_sentences=1,
        )

    def _rows(self, split: Split) -> Iterator[Row]:
        return map(_row, _summarized_docs(self.packages, self.cache_dir, split))

    def _to_example(self, row: Row) -> Example:
        summary = row.fields["summary"]
        return Example(source=PROMPT + row.fields["body"], target=summary, reference=sentence_per_line(summary))


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsTopic:
    """The package that a docstring documents."""

    name: ClassVar[str] = "pydocs-topic"
    packages: tuple[str, ...] = ("numpy", "scipy", "sklearn", "sympy", "torch")
    """Installed packages: the classes, in this order, and the words for them."""
    max_docs_per_package: int = 2000
    """Docstrings used of each package, so that none is most of the data."""
    cache_dir: Path | None = None
    """Folder that keeps parsed docstrings; null: parse them anew."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if len(set(self.packages)) < 2 or len(set(self.packages)) != len(self.packages):
            raise ValueError(f"packages: {list(self.packages)} must be at least two, all different")
        if STANDARD_LIBRARY in self.packages:
            raise ValueError(f"packages: {STANDARD_LIBRARY!r} stands for many packages; name single ones")
        if self.max_docs_per_package < 1:
            raise ValueError(f"max_docs_per_package: {self.max_docs_per_package} must be at least 1")

    def build(self) -> Task:
        """The task over these packages."""
        return Task(
            name=self.name,
            kind="classification",
            splits={split: partial(self._rows, split) for split in PYDOC_SPLITS},
            to_example=self._to_example,
            metrics=("accuracy", "f1_macro"),
            label_words=self.packages,
            postprocess=partial(word_to_class, self.packages),
            max_source_tokens=256,
            max_target_tokens=16,
        )

    def _rows(self, split: Split) -> Iterator[Row]:
        docs = _in_hash_order(_docs(self.packages, self.cache_dir))
        count = dict.fromkeys(self.packages, 0)
        for doc in docs:
            count[doc.package] += 1
            if count[doc.package] <= self.max_docs_per_package and text_split(doc) == split:
                yield _row(doc)

    def _to_example(self, row: Row) -> Example:
        package = row.fields["package"]
        source = joined_prompt("topic", {"text": _one_line(row.fields["text"])})
        return Example(source=source, target=package, reference=self.packages.index(package))


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsMatch:
    """Whether a summary and a body come from the same docstring."""

    name: ClassVar[str] = "pydocs-match"
    packages: tuple[str, ...] = (STANDARD_LIBRARY, "numpy", "scipy", "sklearn", "torch")
    """Installed packages, or `stdlib`, whose docstrings are used; empty: all."""
    cache_dir: Path | None = None
    """Folder that keeps parsed docstrings; null: parse them anew."""

    def build(self) -> Task:
        """The task over these packages."""
        return Task(
            name=self.name,
            kind="classification",
            splits={split: partial(self._rows, split) for split in PYDOC_SPLITS},
            to_example=self._to_example,
            metrics=("accuracy", "f1"),
            label_words=MATCH_WORDS,
            postprocess=partial(word_to_class, MATCH_WORDS),
            max_source_tokens=256,
            max_target_tokens=16,
        )

    def _rows(self, split: Split) -> Iterator[Row]:
        return map(_pair_row, match_pairs(_summarized_docs(self.packages, self.cache_dir, split)))

    def _to_example(self, row: Row) -> Example:
        label = row.fields["label"]
        source = joined_prompt("match", {name: row.fields[name] for name in ("summary", "body")})
        return Example(source=source, target=MATCH_WORDS[label], reference=label)


def text_split(doc: PyDoc) -> Split:
    """Which split a docstring belongs to where packages are labels: about one in ten is held out, by a hash of its text."""
    return "validation" if _digest(doc)[0] < HELD_OUT_BYTES else "train"


def match_pairs(docs: Sequence[PyDoc]) -> list[tuple[PyDoc, PyDoc, int]]:
    """Pairs of docstrings: summary of the first, body of the second, and 1 if they are the same docstring, else 0.

    Taken four at a time, a b c d give (a, a, 1), (b, b, 1), (c, d, 0), (d, c, 0): every summary and every body occurs once,
    exactly half of the pairs match, and neither text alone tells the label. Docstrings that repeat a summary are left out
    (a foreign body could then be right), as are up to three at the end.
    """
    unique = list({doc.summary: doc for doc in reversed(docs)}.values())[::-1]
    pairs: list[tuple[PyDoc, PyDoc, int]] = []
    for i in range(0, len(unique) - 3, 4):
        a, b, c, d = unique[i : i + 4]
        pairs += [(a, a, 1), (c, d, 0), (b, b, 1), (d, c, 0)]
    return pairs


@lru_cache(maxsize=1)
def _docs(packages: tuple[str, ...], cache_dir: Path | None) -> list[PyDoc]:
    """Parsed once in a run, which reads each split more than once."""
    return read_pydocs(packages, cache_dir=cache_dir)


def _summarized_docs(packages: tuple[str, ...], cache_dir: Path | None, split: Split) -> list[PyDoc]:
    docs = [
        doc
        for doc in _docs(packages, cache_dir)
        if split_of(doc.package) == split and doc.summary and len(doc.body.split()) >= MIN_BODY_WORDS
    ]
    if not docs:
        raise DataError(
            f"task.packages: none of {', '.join(packages)} is in the {split} split, which goes by package; add {STANDARD_LIBRARY!r}"
        )
    return _in_hash_order(docs)


def _in_hash_order(docs: Sequence[PyDoc]) -> list[PyDoc]:
    """A mixed order of its own, so that the first rows of a split are a fair sample of it."""
    return sorted(docs, key=lambda doc: _digest(doc)[1:])


def _digest(doc: PyDoc) -> bytes:
    return hashlib.sha256(doc.text.encode()).digest()


def _origin(doc: PyDoc) -> str:
    return f"docstring of {'.'.join(filter(None, (doc.module, doc.name)))}"


def _row(doc: PyDoc) -> Row:
    fields = {"package": doc.package, "summary": doc.summary, "body": _one_line(doc.body), "text": doc.text}
    return Row(fields, _origin(doc))


def _pair_row(pair: tuple[PyDoc, PyDoc, int]) -> Row:
    summary, body, label = pair
    fields = {"summary": summary.summary, "body": _one_line(body.body), "label": label}
    return Row(fields, f"{_origin(summary)} with the {_origin(body)}")


def _one_line(text: str) -> str:
    """Docstrings are wrapped and indented for the eye: one blank for each run of white space."""
    return " ".join(text.split())

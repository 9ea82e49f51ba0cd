"""Where pretraining text comes from: local files, data sets of the Hugging Face hub, or the built-in `pydocs`.

A corpus is read as one stream of documents in a fixed order. Each document carries its position, so that reading can go on behind any
document without reading what lies in earlier files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from spade_t5.data.files import BadRows, TextDocuments, expand_paths, read_rows
from spade_t5.data.pydocs import Split, read_pydocs, split_of
from spade_t5.errors import DataError

Position = tuple[int, int]

START: Position = (0, 0)


class Document(NamedTuple):
    """One text of a corpus."""

    position: Position
    """(file, line): which file of the corpus it is in, from 0, and the line there, from 1."""
    text: str
    """Its text."""
    split: Split | None
    """Split that the corpus itself puts it in; None leaves that to the store."""
    bad_rows: int
    """Bad rows between the document before and this one."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus ready to be read."""

    fingerprint: dict[str, Any]
    """What it consists of; equal fingerprints mean equal documents in equal order."""
    read: Callable[[Position, BadRows], Iterator[Document]]
    """Documents behind a position; bad rows behind it are told to the second argument."""
    num_files: int
    """Number of files, for the progress bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesCorpus:
    """Local files: JSON lines, Parquet, tables or plain text, packed by gzip or not."""

    name: ClassVar[str] = "files"

    paths: tuple[str, ...]
    """Files, globs, or folders with all files below them."""
    text_field: str = "text"
    """Field of a row that holds the document; plain text files have the one field `text`."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file: the whole `file`, or the lines between `blank_line`s."""

    def open(self) -> Corpus:
        """Finds the files.

        Raises:
            DataError: a path names nothing, or a file of an unknown kind.
        """
        files = expand_paths(self.paths)
        return Corpus(
            fingerprint={
                "name": self.name,
                "files": [[str(path), path.stat().st_size] for path in files],
                "text_field": self.text_field,
                "text_documents": self.text_documents,
            },
            read=lambda start, bad_rows: self._read(files, start, bad_rows),
            num_files=len(files),
        )

    def _read(self, files: list[Path], start: Position, bad_rows: BadRows) -> Iterator[Document]:
        counted = bad_rows.count
        for number in range(start[0], len(files)):
            bad_rows.ignored_lines = start[1] if number == start[0] else 0
            rows = read_rows(
                files[number], bad_rows=bad_rows, required={self.text_field: str}, text_documents=self.text_documents
            )
            for row in rows:
                if (number, row.line) > start:
                    yield Document((number, row.line), row.fields[self.text_field], None, bad_rows.count - counted)
                    counted = bad_rows.count


@dataclass(frozen=True, kw_only=True, slots=True)
class HubCorpus:
    """A data set of the Hugging Face hub, streamed; no code of the data set is run."""

    name: ClassVar[str] = "hub"

    dataset: str
    """Name on the hub, such as `allenai/c4`, or the path of a local folder in the hub's layout."""
    subset: str | None = None
    """Configuration of the data set, such as `en`; null: its only or default one."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit or tag; null: the newest, which may differ when preparation goes on another day."""
    text_field: str = "text"
    """Field of a row that holds the document."""

    def open(self) -> Corpus:
        """Finds the data set.

        Raises:
            DataError: it cannot be had, or has no such subset or split.
        """
        import datasets

        try:
            rows = datasets.load_dataset(
                self.dataset, self.subset, split=self.split, revision=self.revision, streaming=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"corpus.dataset: {self.dataset} split {self.split} cannot be loaded: {reason}") from None
        fields = ("dataset", "subset", "split", "revision", "text_field")
        return Corpus(
            fingerprint={"name": self.name, **{field: getattr(self, field) for field in fields}},
            read=lambda start, bad_rows: self._read(rows, start, bad_rows),
            num_files=1,
        )

    def _read(self, rows: Any, start: Position, bad_rows: BadRows) -> Iterator[Document]:
        line, counted = start[1], bad_rows.count
        try:
            for line, fields in enumerate(rows.skip(start[1]), start[1] + 1):
                text = fields.get(self.text_field)
                if isinstance(text, str):
                    yield Document((0, line), text, None, bad_rows.count - counted)
                    counted = bad_rows.count
                else:
                    bad_rows.report(
                        self.dataset, line, f"field {self.text_field!r} is {type(text).__name__}, expected str"
                    )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"corpus.dataset: {self.dataset} cannot be read behind row {line}: {reason}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class PydocsCorpus:
    """Docstrings of this Python installation; packages, not documents, are held out."""

    name: ClassVar[str] = "pydocs"

    packages: tuple[str, ...] = ()
    """Import names of packages, or `stdlib`; none means everything installed."""
    cache_dir: Path | None = None
    """Folder that keeps what was parsed; null parses anew."""

    def open(self) -> Corpus:
        """Gathers the docstrings.

        Raises:
            DataError: a package is not installed.
        """
        docs = read_pydocs(self.packages, cache_dir=self.cache_dir)

        def read(start: Position, bad_rows: BadRows) -> Iterator[Document]:
            for line in range(start[1], len(docs)):
                yield Document((0, line + 1), docs[line].text, split_of(docs[line].package), 0)

        size = sum(len(doc.text) for doc in docs)
        fingerprint = {"name": self.name, "packages": list(self.packages), "documents": len(docs), "characters": size}
        return Corpus(fingerprint=fingerprint, read=read, num_files=1)


CorpusConfig = FilesCorpus | HubCorpus | PydocsCorpus

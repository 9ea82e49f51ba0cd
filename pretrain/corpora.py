"""Where pretraining text comes from: local files, data sets of the Hugging Face hub, or the built-in `pydocs`.

A corpus is a fixed sequence of files, and a file a sequence of documents with growing line numbers. So work can be shared out by file, and
reading can go on behind any document without reading an earlier file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from spade_t5.data.files import BadRows, TextDocuments, check_suffix, expand_paths, read_rows
from spade_t5.data.lines import MAX_LINE_BYTES
from spade_t5.data.pydocs import PyDoc, Split, read_pydocs, split_of
from spade_t5.errors import DataError
from spade_t5.messages import reason_of, without_credentials


class Document(NamedTuple):
    """One text of a corpus."""

    line: int
    """Line of its file that it starts on, from 1; for Parquet the number of its row."""
    text: str
    """Its text."""
    split: Split | None
    """Split that the corpus itself puts it in; None leaves that to a hash of the text."""


class SourceFile(NamedTuple):
    """One file of a corpus."""

    name: str
    """Path or URL."""
    num_bytes: int | None
    """Its size as it lies there, packed or not; None if that is not known."""


class Corpus(Protocol):
    """A corpus ready to be read; pickles, so that processes open files themselves."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What it consists of, as JSON; equal fingerprints mean equal documents in equal order."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """Its files, in a fixed order."""

    def read(self, file: int, start_line: int, bad_rows: BadRows) -> Iterator[Document]:
        """The documents of `files[file]` behind line `start_line`, or all for 0; bad rows behind it are told to `bad_rows`.

        Raises:
            DataError: the file cannot be had.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesCorpus:
    """Local files: JSON lines, Parquet, tables or plain text, packed by gzip, zstd or not at all."""

    name: ClassVar[str] = "files"

    paths: tuple[str, ...]
    """Files, globs, or folders with all files below them."""
    text_field: str = "text"
    """Field of a row that holds the document; plain text files have the one field `text`."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file: the whole `file`, or the lines between `blank_line`s."""
    max_line_bytes: int = MAX_LINE_BYTES
    """Longest line, unpacked, and longest document of a plain text file, so with `text_documents: file` the longest such file; what is
    longer is a bad row and left out whole."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _check_max_line_bytes(self.max_line_bytes)

    def open(self) -> Corpus:
        """Finds the files.

        Raises:
            DataError: a path names nothing, or a file of an unknown kind.
        """
        files = tuple(SourceFile(str(path), path.stat().st_size) for path in expand_paths(self.paths))
        return _RowFiles(
            origin={"name": self.name},
            files=files,
            text_field=self.text_field,
            text_documents=self.text_documents,
            max_line_bytes=self.max_line_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HubCorpus:
    """A data set of the Hugging Face hub, read over the network; no code of the data set is run."""

    name: ClassVar[str] = "hub"

    dataset: str
    """Name on the hub, such as `allenai/c4`, or the path of a local folder in the hub's layout."""
    subset: str | None = None
    """Configuration of the data set, such as `en`; null: its only or default one."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit, branch or tag; null: the newest. What it stands for at the start is pinned."""
    text_field: str = "text"
    """Field of a row that holds the document."""
    text_documents: TextDocuments = "file"
    """What a document is in a plain text file: the whole `file`, or the lines between `blank_line`s."""
    max_line_bytes: int = MAX_LINE_BYTES
    """Longest line, unpacked, and longest document of a plain text file, so with `text_documents: file` the longest such file; what is
    longer is a bad row and left out whole."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        _check_max_line_bytes(self.max_line_bytes)

    def open(self) -> Corpus:
        """Finds the files of the split; on the hub, those of one commit, which their URLs name.

        Raises:
            DataError: the data set cannot be had, has no such subset or split, or files of a kind that cannot be read.
        """
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.dataset, self.subset, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(error) from None
        by_split = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        if self.split not in by_split:
            raise DataError(
                f"corpus.split: {self.dataset} has no split {self.split!r}; use one of {', '.join(by_split) or 'none'}"
            )
        for name in by_split[self.split]:
            check_suffix(name)
        try:
            files = tuple(SourceFile(name, _size(name)) for name in by_split[self.split])
        except OSError as error:
            raise self._failure(error) from None
        return _RowFiles(
            origin={
                "name": self.name,
                "dataset": without_credentials(self.dataset),
                "subset": self.subset,
                "split": self.split,
            },
            files=files,
            text_field=self.text_field,
            text_documents=self.text_documents,
            max_line_bytes=self.max_line_bytes,
        )

    def _failure(self, error: Exception) -> DataError:
        reason = reason_of(error)
        return DataError(f"corpus.dataset: {self.dataset} cannot be loaded: {reason}")


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
        return _Docstrings(self.packages, tuple(read_pydocs(self.packages, cache_dir=self.cache_dir)))


CorpusConfig = FilesCorpus | HubCorpus | PydocsCorpus


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowFiles:
    """Files of rows, one field of which is the document."""

    origin: dict[str, Any]
    files: tuple[SourceFile, ...]
    text_field: str
    text_documents: TextDocuments
    max_line_bytes: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            **self.origin,
            "files": [[without_credentials(file.name), file.num_bytes] for file in self.files],
            "text_field": self.text_field,
            "text_documents": self.text_documents,
            "max_line_bytes": self.max_line_bytes,
        }

    def read(self, file: int, start_line: int, bad_rows: BadRows) -> Iterator[Document]:
        rows = read_rows(
            self.files[file].name,
            bad_rows=bad_rows,
            required={self.text_field: str},
            text_documents=self.text_documents,
            start_line=start_line,
            max_line_bytes=self.max_line_bytes,
        )
        for row in rows:
            yield Document(row.line, row.fields[self.text_field], None)


@dataclass(frozen=True, slots=True)
class _Docstrings:
    """Docstrings as one file that exists nowhere; each is a line."""

    packages: tuple[str, ...]
    docs: tuple[PyDoc, ...]

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": PydocsCorpus.name,
            "packages": list(self.packages),
            "documents": len(self.docs),
            "characters": sum(len(doc.text) for doc in self.docs),
        }

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return (SourceFile("pydocs", None),)

    def read(self, file: int, start_line: int, bad_rows: BadRows) -> Iterator[Document]:
        for line in range(start_line, len(self.docs)):
            bad_rows.good_row()
            yield Document(line + 1, self.docs[line].text, split_of(self.docs[line].package))


def _size(name: str) -> int | None:
    """Size of a local or remote file."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(name)
    size = filesystem.info(path).get("size")
    return None if size is None else int(size)


def _check_max_line_bytes(value: int) -> None:
    if value < 1:
        raise ValueError(f"max_line_bytes: {value} must be at least 1")

"""Rows from local files: JSON lines, Parquet, plain text and tab-separated tables, packed by gzip or not.

A row is a mapping of field names to values. Rows that cannot be read are reported with file and line, counted and left out; in strict
mode the first one ends the run. Nothing is downloaded here, and nothing but rows is made of the data.
"""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from spade_t5.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz", ".tsv", ".tsv.gz")
TextDocuments = Literal["file", "blank_line"]

_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row of a file."""

    line: int
    """Line of the file it starts on, from 1; for Parquet the number of the row, from 1."""
    fields: dict[str, Any]
    """Values by field name."""


@dataclass
class BadRows:
    """What was wrong with the rows that were left out: a report for each, and a count."""

    strict: bool = False
    """Raise at the first bad row instead of leaving it out."""
    count: int = 0
    """Bad rows so far."""
    ignored_lines: int = 0
    """Reports on lines up to this one are dropped: an earlier run has counted them."""

    def report(self, path: Path | str, line: int, reason: str) -> None:
        """Counts and logs one bad row.

        Raises:
            DataError: in strict mode.
        """
        if line <= self.ignored_lines:
            return
        if self.strict:
            raise DataError(
                f"{path}: line {line}: {reason}; mend the row, or leave out the strict setting to skip such rows"
            )
        self.count += 1
        logger.warning("%s: line %d: %s (row skipped)", path, line, reason)


def expand_paths(patterns: Sequence[str], *, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that paths, globs and folders name, each once.

    A folder stands for all files below it with one of `suffixes`; files of one pattern are in the order of their names.

    Raises:
        DataError: a pattern names nothing, or a file of an unknown kind.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(tuple(suffixes))]
        elif any(c in pattern for c in "*?[") and not path.exists():
            root = Path(path.anchor) if path.is_absolute() else Path()
            matches = [p for p in sorted(root.glob(str(path.relative_to(root)))) if p.is_file()]
        else:
            matches = [path] if path.exists() else []
        if not matches:
            raise DataError(
                f"{pattern}: no such file, or a folder or pattern without any file of {', '.join(suffixes)}"
            )
        for match in matches:
            if not match.name.endswith(tuple(suffixes)):
                raise DataError(f"{match}: unknown kind of file; rename it to one of {', '.join(suffixes)}")
            found[match] = None
    if not found:
        raise DataError("no input files are given")
    return list(found)


def read_rows(
    path: Path,
    *,
    bad_rows: BadRows,
    required: Mapping[str, type] | None = None,
    text_documents: TextDocuments = "file",
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Rows of one file, by its suffix.

    Plain text has one field, `text`. It gives one row for the whole file, or, with `text_documents="blank_line"`, one for each stretch
    of lines between blank lines.

    Args:
        path: a file with one of `SUFFIXES`.
        bad_rows: told about rows that cannot be read or lack a required field.
        required: types that fields must have; a string must also be encodable, so no lone surrogates.
        text_documents: what is a row in plain text.
        columns: names of the columns of a table without header line.

    Raises:
        DataError: the file is missing or of an unknown kind; in strict mode also at the first bad row.
    """
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if name.endswith(".jsonl"):
        rows = _json_rows(path, bad_rows)
    elif name.endswith(".parquet"):
        rows = _parquet_rows(path, bad_rows)
    elif name.endswith(".tsv"):
        rows = read_tsv(path, bad_rows=bad_rows, columns=columns)
    elif name.endswith(".txt"):
        rows = _text_rows(path, bad_rows, text_documents)
    else:
        raise DataError(f"{path}: unknown kind of file; rename it to one of {', '.join(SUFFIXES)}")
    for row in rows:
        reason = _missing(row.fields, required or {})
        if reason is None:
            yield row
        else:
            bad_rows.report(path, row.line, reason)


def read_tsv(path: Path, *, bad_rows: BadRows, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a tab-separated table, with quoting off: a quotation mark is a character like any other.

    Lines end at a line feed, fields at a tab; a byte order mark at the start is dropped. A row with another number of fields than the
    table has columns is bad. All values are strings.

    Args:
        path: the table, packed by gzip if its name ends in .gz.
        bad_rows: told about rows with too few or too many fields.
        columns: column names; without them the first line holds them.
    """
    names = list(columns) if columns is not None else None
    for number, text in _text_lines(path, bad_rows):
        values = text.split("\t")
        if names is None:
            names = values
        elif len(values) == len(names):
            yield Row(number, dict(zip(names, values, strict=True)))
        else:
            bad_rows.report(path, number, f"{len(values)} fields, the table has {len(names)} columns")


def _json_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    for number, text in _text_lines(path, bad_rows):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            bad_rows.report(path, number, f"not JSON: {error}")
            continue
        if isinstance(value, dict):
            yield Row(number, value)
        else:
            bad_rows.report(path, number, f"a JSON {type(value).__name__}, expected an object")


def _parquet_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        bad_rows.report(path, number + 1, f"the rest of the file is unreadable: {' '.join(str(error).split())}")


def _text_rows(path: Path, bad_rows: BadRows, text_documents: TextDocuments) -> Iterator[Row]:
    start, lines = 1, list[str]()
    for number, text in _text_lines(path, bad_rows, keep_blank=True):
        if text_documents == "blank_line" and not text.strip():
            if lines:
                yield Row(start, {"text": "\n".join(lines)})
            lines = []
            continue
        if not lines:
            start = number
        lines.append(text)
    if any(line.strip() for line in lines):
        yield Row(start, {"text": "\n".join(lines).rstrip("\n")})


def _text_lines(path: Path, bad_rows: BadRows, *, keep_blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, each decoded by itself so that a bad byte costs one line."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                data = raw.removeprefix(_BOM) if number == 1 else raw
                try:
                    text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
                except UnicodeDecodeError as error:
                    bad_rows.report(path, number, f"not UTF-8: {error.reason} at byte {error.start} of the line")
                    continue
                if text.strip() or keep_blank:
                    yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad_rows.report(path, number + 1, f"the rest of the file is unreadable: {error}")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _missing(fields: Mapping[str, Any], required: Mapping[str, type]) -> str | None:
    """Why a row does not have the required fields; None if it has."""
    for name, kind in required.items():
        if name not in fields:
            return f"no field {name!r}, only {', '.join(sorted(map(repr, fields)))[:200]}"
        value = fields[name]
        if not isinstance(value, kind):
            return f"field {name!r} is {type(value).__name__}, expected {kind.__name__}"
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                return f"field {name!r} holds a lone surrogate"
    return None

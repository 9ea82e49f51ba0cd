"""Rows from files, local or remote: JSON lines, Parquet, plain text and tab-separated tables, packed or not.

A row is a mapping of field names to values. Rows that cannot be read are reported with file and line, counted and left out; in strict
mode the first one ends the run. What of a file is unreadable from some place on is one report. Nothing but rows is made of the data.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spade_t5.data.bad_rows import BadRowLimits, BadRows
from spade_t5.data.lines import (
    MAX_LINE_BYTES,
    BrokenFileError,
    RawLine,
    RemoteReadError,
    is_remote,
    open_binary,
    persistently,
    raw_lines,
)
from spade_t5.errors import DataError
from spade_t5.messages import printable

__all__ = [
    "SUFFIXES",
    "BadRowLimits",
    "BadRows",
    "Row",
    "TextDocuments",
    "check_suffix",
    "expand_paths",
    "read_rows",
    "read_tsv",
]

_KINDS = (".jsonl", ".json", ".txt", ".tsv")
_PACKED = ("", ".gz", ".zst")
SUFFIXES = (*(kind + packed for kind in _KINDS for packed in _PACKED), ".parquet")
TextDocuments = Literal["file", "blank_line"]

_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 256


class Row(NamedTuple):
    """One row of a file."""

    line: int
    """Line of the file it starts on, from 1; for Parquet the number of the row, from 1."""
    fields: dict[str, Any]
    """Values by field name."""


def expand_paths(patterns: Sequence[str], *, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that paths, globs and folders name, each once.

    A folder stands for all files below it with one of `suffixes`; files of one pattern are in the order of their names. Below a folder,
    and for `**`, links to folders are followed, to each folder once.

    Raises:
        DataError: a pattern names nothing, or a file of an unknown kind; a folder cannot be listed.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            below = (p for folder in _folders_below(path) for p in folder.iterdir())
            matches = sorted(p for p in below if p.is_file() and p.name.endswith(tuple(suffixes)))
        elif any(c in pattern for c in "*?[") and not path.exists():
            root = Path(path.anchor) if path.is_absolute() else Path()
            matches = sorted(p for p in _glob(root, path.relative_to(root).parts) if p.is_file())
        else:
            matches = [path] if path.exists() else []
        if not matches:
            raise DataError(
                f"{printable(pattern)}: no such file, or a folder or pattern without any file of {', '.join(suffixes)}"
            )
        for match in matches:
            if not match.name.endswith(tuple(suffixes)):
                raise DataError(f"{printable(match)}: unknown kind of file; rename it to one of {', '.join(suffixes)}")
            found[match] = None
    if not found:
        raise DataError("no input files are given")
    return list(found)


def _glob(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """As `Path.glob`, but `**` follows links too."""
    if "**" not in parts:
        yield from folder.glob("/".join(parts)) if parts else ()
        return
    place = parts.index("**")
    for root in folder.glob("/".join(parts[:place])) if place else (folder,):
        for below in _folders_below(root) if root.is_dir() else ():
            yield from _glob(below, parts[place + 1 :])


def _folders_below(folder: Path) -> list[Path]:
    """A folder and those below it, links followed, each once however many links lead to it and in whatever circle.

    A folder that can be reached without a link goes by that name, so a link `newest` beside the folders changes nothing.
    """

    def refused(error: OSError) -> None:
        raise DataError(f"{printable(error.filename)}: cannot be listed: {error.strerror}; check its permissions")

    found: dict[str, Path] = {}  # by real path
    roots = [folder]
    for root in roots:  # grows: links wait until all that needs none has been found
        for parent, names, _ in os.walk(root, onerror=refused):
            real = os.path.realpath(parent)
            if real in found:
                names.clear()
                continue
            found[real] = Path(parent)
            roots += [Path(parent, name) for name in sorted(names) if os.path.islink(os.path.join(parent, name))]
            names.sort()
    return list(found.values())


def read_rows(
    path: Path | str,
    *,
    bad_rows: BadRows,
    required: Mapping[str, type] | None = None,
    text_documents: TextDocuments = "file",
    columns: Sequence[str] | None = None,
    start_line: int = 0,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Rows of one file, by its suffix.

    JSON files hold one object a line, whether they are called .jsonl or, as C4's, .json. Plain text has one field, `text`. It gives one row
    for the whole file, or, with `text_documents="blank_line"`, one for each stretch of lines between blank lines.

    Args:
        path: a file with one of `SUFFIXES`, or its URL.
        bad_rows: told about rows that cannot be read or lack a required field.
        required: types that fields must have; a string must also be encodable, so no lone surrogates. Parquet files are read in these
            columns alone if any are named.
        text_documents: what is a row in plain text.
        columns: names of the columns of a table without header line.
        start_line: rows up to this line are passed over, and nothing bad in them is reported.
        max_line_bytes: longest line, and longest document of a plain text file; what is longer is a bad row, so is a longer string in a
            required field.

    Raises:
        DataError: the file is missing or of an unknown kind; in strict mode also at the first bad row.
    """
    check_suffix(path)
    if not is_remote(path) and not Path(path).is_file():
        raise DataError(f"{printable(path)}: no such file")
    name = str(path).removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".json")):
        rows = _json_rows(path, bad_rows, start_line, max_line_bytes)
    elif name.endswith(".parquet"):
        rows = _parquet_rows(path, bad_rows, start_line, max_line_bytes, list(required or ()) or None)
    elif name.endswith(".tsv"):
        rows = _tsv_rows(path, bad_rows, columns, start_line, max_line_bytes)
    else:
        rows = _text_rows(path, bad_rows, text_documents, start_line, max_line_bytes)
    for row in rows:
        problem = _problem(row.fields, required or {}, max_line_bytes)
        if problem is None:
            bad_rows.good_row()
            yield Row(row.line, row.fields)
        else:
            _report(path, row.source, bad_rows, *problem)


def check_suffix(path: Path | str) -> None:
    """Fails if a file is of an unknown kind.

    Raises:
        DataError: naming the kinds.
    """
    if not str(path).endswith(SUFFIXES):
        raise DataError(f"{printable(path)}: unknown kind of file; rename it to one of {', '.join(SUFFIXES)}")


def read_tsv(
    path: Path | str,
    *,
    bad_rows: BadRows,
    columns: Sequence[str] | None = None,
    start_line: int = 0,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Rows of a tab-separated table, with quoting off: a quotation mark is a character like any other.

    Lines end at a line feed, fields at a tab; a byte order mark at the start is dropped. A row with another number of fields than the
    table has columns is bad; empty lines are no rows. All values are strings. A table without a readable header is a broken file.

    Args:
        path: the table, packed if its name says so.
        bad_rows: told about rows with too few or too many fields.
        columns: column names; without them the first line that is not empty holds them.
        start_line: rows up to this line are passed over.
        max_line_bytes: a longer line is bad.
    """
    for row in _tsv_rows(path, bad_rows, columns, start_line, max_line_bytes):
        bad_rows.good_row()
        yield Row(row.line, row.fields)


class _Candidate(NamedTuple):
    """A row whose fields have not been looked at, and the line that it starts with."""

    line: int
    fields: dict[str, Any]
    source: RawLine


class _ParquetRow(NamedTuple):
    number: int
    fields: dict[str, Any] | None  # None: a text that is not UTF-8


def _json_rows(path: Path | str, bad_rows: BadRows, start_line: int, max_line_bytes: int) -> Iterator[_Candidate]:
    for raw, text in _text_lines(path, bad_rows, start_line, max_line_bytes):
        if not text or text.isspace():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            _report(path, raw, bad_rows, "not JSON", str(error))
            continue
        if isinstance(value, dict):
            yield _Candidate(raw.number, value, raw)
        else:
            _report(path, raw, bad_rows, f"a JSON {type(value).__name__}, expected an object")


def _tsv_rows(
    path: Path | str, bad_rows: BadRows, columns: Sequence[str] | None, start_line: int, max_line_bytes: int
) -> Iterator[_Candidate]:
    names, header = columns, 0
    if names is None:
        try:
            names, header = _header(path, max_line_bytes)
        except BrokenFileError as error:
            if start_line == 0:
                bad_rows.report(path, 1, str(error), is_end=True)
            return
    for raw, text in _text_lines(path, bad_rows, max(start_line, header), max_line_bytes):
        if not text:
            continue
        values = text.split("\t")
        if len(values) == len(names):
            yield _Candidate(raw.number, dict(zip(names, values, strict=True)), raw)
        else:
            _report(path, raw, bad_rows, f"{len(values)} fields, the table has {len(names)} columns")


def _header(path: Path | str, max_line_bytes: int) -> tuple[list[str], int]:
    """Column names of a table, and the line that they stand on: the first that is not empty, whatever it holds.

    Raises:
        BrokenFileError: this line cannot be read; the next would be taken for the header.
    """
    for raw in raw_lines(path, max_line_bytes=max_line_bytes):
        text, problem = _decoded(raw)
        if problem:
            raise BrokenFileError(f"no header: {problem}")
        if text:
            return text.split("\t"), raw.number
    return [], 0


def _text_rows(
    path: Path | str, bad_rows: BadRows, text_documents: TextDocuments, start_line: int, max_line_bytes: int
) -> Iterator[_Candidate]:
    """Documents of plain text; the file is read from its beginning, since where one starts depends on what stands before."""
    first: RawLine | None = None
    lines: list[str] = []
    num_bytes = 0

    def finished() -> Iterator[_Candidate]:
        if first is None or first.number <= start_line:
            return
        if num_bytes > max_line_bytes:
            _report(path, first, bad_rows, "plain text document longer than max_line_bytes")
        elif any(line.strip() for line in lines):
            yield _Candidate(first.number, {"text": "\n".join(lines).rstrip("\n")}, first)

    for raw, text in _text_lines(path, bad_rows, 0, max_line_bytes, reported_from=start_line):
        if text_documents == "blank_line" and not text.strip():
            yield from finished()
            first, lines, num_bytes = None, [], 0
            continue
        first = first or raw
        num_bytes += len(raw.data or b"") + 1
        if num_bytes <= max_line_bytes:
            lines.append(text)
    yield from finished()


def _text_lines(
    path: Path | str,
    bad_rows: BadRows,
    start_line: int,
    max_line_bytes: int,
    *,
    reported_from: int = 0,
) -> Iterator[tuple[RawLine, str]]:
    """Lines without their ends, blank ones too, each decoded by itself so that a bad byte costs one line."""
    number = start_line
    try:
        for raw in raw_lines(path, start_line=start_line, max_line_bytes=max_line_bytes):
            number = raw.number
            text, problem = _decoded(raw)
            if not problem:
                yield raw, text
            elif number > reported_from:
                _report(path, raw, bad_rows, problem)
    except BrokenFileError as error:
        bad_rows.report(path, number + 1, str(error), is_end=True)


def _decoded(raw: RawLine) -> tuple[str, str]:
    """The text of a line, and why there is none."""
    if raw.data is None:
        return "", "line too long"
    try:
        return (raw.data.removeprefix(_BOM) if raw.number == 1 else raw.data).decode("utf-8").removesuffix("\r"), ""
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _parquet_rows(
    path: Path | str, bad_rows: BadRows, start_line: int, max_line_bytes: int, columns: list[str] | None
) -> Iterator[_Candidate]:
    number = start_line
    try:
        for row in persistently(path, start_line, lambda start: _parquet_once(path, start, columns)):
            number = row.number
            source = RawLine(number, 0, None, None)
            if row.fields is None:
                _report(path, source, bad_rows, "not UTF-8")
            else:
                yield _Candidate(number, row.fields, source)
    except BrokenFileError as error:
        bad_rows.report(path, number + 1, str(error), is_end=True)


def _parquet_once(path: Path | str, start: int, columns: list[str] | None) -> Iterator[_ParquetRow]:
    """Rows behind row `start`; row groups that end before it are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_binary(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            missing = set(columns or ()) - set(table.schema_arrow.names)
            if missing:
                raise BrokenFileError(f"no column {', '.join(sorted(map(repr, missing)))}")
            number = 0
            for group in range(table.num_row_groups):
                group_rows = table.metadata.row_group(group).num_rows
                if number + group_rows <= start:
                    number += group_rows
                    continue
                for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=columns):
                    for fields in _batch_rows(batch):
                        number += 1
                        if number > start:
                            yield _ParquetRow(number, fields)
    except RemoteReadError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow calls some damage an OSError; one with a number is of the operating system and says nothing of the content.
        if getattr(error, "errno", None) is not None:
            raise
        raise BrokenFileError("Parquet is damaged") from None


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            try:
                yield from batch.slice(place, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _report(path: Path | str, line: RawLine, bad_rows: BadRows, reason: str, detail: str = "") -> None:
    """Reports a bad row; those of Parquet have no bytes of their own."""
    is_parquet = str(path).endswith(".parquet")
    digest = line.sha256 if line.data is None else hashlib.sha256(line.data).hexdigest()
    offset = None if is_parquet else line.byte_offset
    bad_rows.report(path, line.number, reason, detail=detail, byte_offset=offset, sha256=digest)


def _problem(fields: Mapping[str, Any], required: Mapping[str, type], max_bytes: int) -> tuple[str, str] | None:
    """Why a row does not have the required fields, and more on it; None if it has."""
    for name, kind in required.items():
        if name not in fields:
            return f"no field {name!r}", f"only {', '.join(sorted(map(repr, fields)))[:200]}"
        value = fields[name]
        if not isinstance(value, kind):
            return f"field {name!r} is {type(value).__name__}, expected {kind.__name__}", ""
        if isinstance(value, str) and len(value) > max_bytes:
            return f"field {name!r} is too long", ""
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                return f"field {name!r} holds a lone surrogate", ""
    return None

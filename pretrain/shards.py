"""Units of preparation: a few consecutive files of a corpus become shards, by a rule that looks at nothing else.

A unit is the next files up to a fixed number of bytes, at least one. Its documents are collected until they hold `shard_tokens` tokens, both splits
together; then they are a part: a shard for each split, and a record. The record is written last and is what makes the part count: it says
how far the part goes, what it holds, and which rows in it were bad. A part whose shards are not there in the size that its record says is done
again. Who writes a unit, and how often it was killed over it, cannot be seen in the result: a unit goes on behind its last record, and what it
had begun is done again.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from spade_t5.checkpoint.manifest import sync
from spade_t5.data.bad_rows import BadRow, BadRowLimits, BadRows
from spade_t5.errors import DataError
from spade_t5.messages import without_credentials
from spade_t5.pretrain.corpora import Corpus, Document, SourceFile
from spade_t5.pretrain.encoding import TextEncoder, Tokens, is_held_out
from spade_t5.pretrain.store import SPLITS, Shard, write_json, write_shard

RECORD_FORMAT = 1
"""Version of the records; those of another cannot be gone on from."""

_BATCH_CHARACTERS = 200_000


class Unit(NamedTuple):
    """Consecutive files of a corpus that are prepared by themselves."""

    number: int
    """Its place among the units, from 0."""
    first_file: int
    """Its first file."""
    end_file: int
    """The file behind its last."""


class Place(NamedTuple):
    """A place between two documents of a corpus."""

    file: int
    """Number of the file."""
    line: int
    """The document before it starts on this line; 0 is the beginning of the file."""


class Placed(NamedTuple):
    """A document with the file it comes from."""

    file: int
    """Number of the file."""
    document: Document
    """The document."""

    @property
    def place(self) -> Place:
        """The place behind it."""
        return Place(self.file, self.document.line)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The record of one finished part of a unit."""

    place: Place
    """Behind its last document."""
    is_last: bool
    """Whether the unit ends with it."""
    shards: dict[str, Shard]
    """Its shards by split; a split without documents has none."""
    num_documents: int
    """Documents, empty ones included."""
    num_empty_documents: int
    """Documents without a token, or of white space alone; they are in no shard."""
    num_tokens: int
    """Tokens of both splits."""
    bad_rows: tuple[BadRow, ...]
    """Bad rows among its documents."""
    file_rows: int
    """Rows of the file at `place` up to there, bad ones included."""
    file_bad_rows: int
    """Bad rows among them."""

    @property
    def num_rows(self) -> int:
        """Rows, bad ones included."""
        return self.num_documents + len(self.bad_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitJob:
    """What a process needs to know to write units; pickles."""

    corpus: Corpus
    """The text."""
    encoder: TextEncoder
    """Makes tokens of it."""
    store: Path
    """Folder of the shards."""
    progress: Path
    """Folder of the records."""
    held_out_fraction: float
    """Share of the documents in the validation split, where the corpus has no splits of its own."""
    shard_tokens: int
    """Tokens in a part, both splits together."""
    strict: bool
    """Stop at the first bad row."""
    limits: BadRowLimits
    """How much may be bad; a unit looks at the limit for one file, the others are for the whole."""

    def parts(self, unit: int) -> list[Part]:
        """The finished parts of a unit, as far as they go without a gap."""
        parts: list[Part] = []
        while (part := self.part(unit, len(parts))) is not None:
            parts.append(part)
        return parts

    def part(self, unit: int, number: int) -> Part | None:
        """One finished part of a unit; None if there is none, or its shards have been lost.

        Raises:
            DataError: its record is damaged.
        """
        path = self.record_path(unit, number)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            part = Part(
                **{
                    **record,
                    "place": Place(*record["place"]),
                    "shards": {split: Shard(**shard) for split, shard in record["shards"].items()},
                    "bad_rows": tuple(BadRow(*row) for row in record["bad_rows"]),
                }
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path}: damaged; remove it and start again, its part is then made anew") from None
        is_whole = all(_has_size(self.store / shard.file, shard.num_bytes) for shard in part.shards.values())
        return part if is_whole else None

    def record_path(self, unit: int, number: int) -> Path:
        """File of the record of a part."""
        return self.progress / f"unit-{unit:05d}-{number:05d}.json"

    def shard_path(self, unit: int, number: int, split: str) -> Path:
        """File of a shard."""
        return self.store / f"shard-{unit:05d}-{number:05d}.{split}.arrow"


class Step(NamedTuple):
    """One document that has been written, or the end of a unit."""

    file: int
    """First file that is not done."""
    num_documents: int
    """1, or 0 for the end of a unit."""
    num_tokens: int
    """Tokens of the document."""
    num_bad_rows: int
    """Bad rows of the unit that have been read by now, since this process began with it."""
    ends_part: bool
    """A part has been finished."""


Encode = Callable[[Iterable[Sequence[Placed]]], Iterator[tuple[Placed, Tokens]]]
"""Documents in batches to documents with their tokens, in order."""


def units_of(files: Sequence[SourceFile], unit_bytes: int) -> list[Unit]:
    """Divides files into units: each takes the next files until one more would exceed `unit_bytes`, and a file of unknown size is one by itself.

    Example: files of 3, 4, 5 and 20 bytes in units of 8 are units of files 0 and 1, of file 2, and of file 3.
    """
    units: list[Unit] = []
    first, total = 0, 0
    for number, file in enumerate(files):
        size = unit_bytes if file.num_bytes is None else file.num_bytes
        if number > first and total + size > unit_bytes:
            units.append(Unit(len(units), first, number))
            first, total = number, 0
        total += size
    if files:
        units.append(Unit(len(units), first, len(files)))
    return units


def encode_here(encoder: TextEncoder) -> Encode:
    """Encoding in the calling process."""

    def encode(batches: Iterable[Sequence[Placed]]) -> Iterator[tuple[Placed, Tokens]]:
        for batch in batches:
            yield from zip(batch, encoder([placed.document.text for placed in batch]), strict=True)

    return encode


def write_unit(job: UnitJob, unit: Unit, encode: Encode, *, max_documents: int | None = None) -> Iterator[Step]:
    """Writes the parts of a unit that are not there yet, one step for each document.

    Args:
        job: how.
        unit: which.
        encode: makes tokens of its documents.
        max_documents: end the unit behind this many documents more.

    Raises:
        DataError: a file cannot be had, or too much of one is bad; in strict mode at the first bad row.
    """
    writer = _UnitWriter(job, unit)
    if writer.is_finished:
        return
    for placed, tokens in encode(_batches(_documents(job, writer), max_documents)):
        writer.add(placed, tokens)
        ends_part = writer.num_tokens >= job.shard_tokens
        if ends_part:
            writer.finish_part(is_last=False)
        yield Step(placed.file, 1, len(tokens), writer.num_bad_rows_read, ends_part)
    writer.finish_part(is_last=True)
    yield Step(unit.end_file, 0, 0, writer.num_bad_rows_read, True)


class _UnitWriter:
    """Collects the documents and bad rows of a unit and writes them in parts."""

    def __init__(self, job: UnitJob, unit: Unit) -> None:
        self.job, self.unit = job, unit
        parts = job.parts(unit.number)
        last = parts[-1] if parts else None
        self.is_finished = last is not None and last.is_last
        self.place = last.place if last else Place(unit.first_file, 0)
        self.file_rows = last.file_rows if last else 0
        self.file_bad_rows = last.file_bad_rows if last else 0
        self._num_parts = len(parts)
        self._file_numbers = {job.corpus.files[n].name: n for n in range(unit.first_file, unit.end_file)}
        # The reader is ahead of the documents: bad rows wait here until the documents before them have come.
        self._waiting: deque[BadRow] = deque()
        self.num_bad_rows_read = 0
        self._clear()

    def add_bad_row(self, row: BadRow) -> None:
        """Takes a bad row that lies behind all documents added so far."""
        self._waiting.append(row)
        self.num_bad_rows_read += 1

    def add(self, placed: Placed, tokens: Tokens) -> None:
        """Takes the next document."""
        self._take_bad_rows(placed.place)
        self._move(placed.place)
        self.file_rows += 1
        self._num_documents += 1
        text, split = placed.document.text, placed.document.split
        if not len(tokens) or text.isspace():
            self._num_empty += 1
            return
        if split is None:
            split = "validation" if is_held_out(text, self.job.held_out_fraction) else "train"
        self._documents[split].append(tokens)
        self.num_tokens += len(tokens)

    def finish_part(self, *, is_last: bool) -> None:
        """Writes what has been collected; the record, which makes it count, comes last."""
        if is_last:
            self._take_bad_rows(Place(self.unit.end_file, 0))
        shards = {
            split: write_shard(
                self.job.shard_path(self.unit.number, self._num_parts, split),
                documents,
                self.job.encoder.dtype,
                scratch=self.job.progress,  # so that the store holds nothing unfinished, whoever publishes it when
            )
            for split, documents in self._documents.items()
            if documents
        }
        part = Part(
            place=self.place,
            is_last=is_last,
            shards=shards,
            num_documents=self._num_documents,
            num_empty_documents=self._num_empty,
            num_tokens=self.num_tokens,
            bad_rows=tuple(self._bad_rows),
            file_rows=self.file_rows,
            file_bad_rows=self.file_bad_rows,
        )
        sync(self.job.store)  # a record must not outlive the names of its shards in a power cut
        write_json(self.job.record_path(self.unit.number, self._num_parts), asdict(part))
        self._num_parts += 1
        self._clear()

    def _take_bad_rows(self, place: Place) -> None:
        while self._waiting:
            row = self._waiting[0]
            row_place = Place(self._file_numbers[row.file], row.line)
            if row_place > place:
                return
            self._move(row_place._replace(line=0))
            self.file_rows += 1
            self.file_bad_rows += 1
            self._waiting.popleft()
            self._bad_rows.append(row._replace(file=without_credentials(row.file)))

    def _move(self, place: Place) -> None:
        """Goes on to a place; in another file, its rows are counted anew."""
        if place.file != self.place.file:
            self.file_rows = self.file_bad_rows = 0
        self.place = max(self.place, place)

    def _clear(self) -> None:
        self._documents: dict[str, list[Tokens]] = {split: [] for split in SPLITS}
        self._num_documents = self._num_empty = self.num_tokens = 0
        self._bad_rows: list[BadRow] = []


def _documents(job: UnitJob, writer: _UnitWriter) -> Iterator[Placed]:
    """Documents of the unit that are in no finished part."""
    start = writer.place
    bad_rows = BadRows(
        strict=job.strict,
        limits=replace(job.limits, share=1.0, broken_file_share=1.0),
        num_files=len(job.corpus.files),
        on_bad_row=writer.add_bad_row,
    )
    bad_rows.start_file(num_rows=writer.file_rows, num_bad_rows=writer.file_bad_rows)
    for document in job.corpus.read(start.file, start.line, bad_rows):
        yield Placed(start.file, document)
    for file in range(start.file + 1, writer.unit.end_file):
        bad_rows.start_file()
        for document in job.corpus.read(file, 0, bad_rows):
            yield Placed(file, document)


def _has_size(file: Path, num_bytes: int) -> bool:
    try:
        return file.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _batches(documents: Iterator[Placed], max_documents: int | None) -> Iterator[list[Placed]]:
    """Documents in batches of about equally many characters; none is read that is not wanted."""
    batch: list[Placed] = []
    characters = num_documents = 0
    while max_documents is None or num_documents < max_documents:
        placed = next(documents, None)
        if placed is None:
            break
        batch.append(placed)
        num_documents += 1
        characters += len(placed.document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

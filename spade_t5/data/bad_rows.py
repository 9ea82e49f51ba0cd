"""Rows that cannot be used: reported with place and reason, counted, and left out, up to a limit.

A report never holds what stood in the row, only where it is and the hash of its bytes, so a list of reports can be passed on when the
data cannot.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from spade_t5.errors import DataError
from spade_t5.messages import printable

logger = logging.getLogger(__name__)

MAX_LOGGED = 20


class BadRow(NamedTuple):
    """Report of one bad row, or of the unreadable rest of a file."""

    file: str
    """Path or URL."""
    line: int
    """Line it starts on, from 1; in Parquet the number of the row, from 1."""
    byte_offset: int | None
    """Where the line begins in the unpacked file; None where rows have no such place."""
    reason: str
    """What is wrong with it."""
    sha256: str | None
    """Hash of its bytes without the line feed; None where they could not be read, and for Parquet."""
    is_end: bool
    """Nothing of the file could be read from here on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRowLimits:
    """How much of a corpus may be bad before a run stops; what is above these is a mistake in the data rather than noise."""

    share: float = 0.001
    """Share of all rows that may be bad."""
    after_rows: int = 10_000
    """Rows that must have been read before the share of all rows counts."""
    file_share: float = 0.05
    """Share of the rows of one file that may be bad."""
    after_file_rows: int = 200
    """Rows of a file that must have been read before its share counts."""
    broken_file_share: float = 0.01
    """Share of the files that may be unreadable, wholly or from some place on; one always may."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("share", "file_share", "broken_file_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} must lie between 0 and 1")
        for name in ("after_rows", "after_file_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must not be negative")

    def check(self, *, num_rows: int, num_broken_files: int, num_files: int, reasons: Mapping[str, int]) -> None:
        """Fails if too much of a corpus is bad.

        Args:
            num_rows: rows read, bad ones included.
            num_broken_files: files that could not be read to their end.
            num_files: files of the corpus.
            reasons: bad rows by reason.

        Raises:
            DataError: naming the limit and the most frequent reasons.
        """
        num_bad = sum(reasons.values())
        if num_rows >= self.after_rows and num_bad > self.share * num_rows:
            raise DataError(
                f"bad_rows.share: {num_bad} of {num_rows} rows are bad, more than {self.share:g} of them: {_top(reasons)}; "
                "mend the data, or allow a larger share"
            )
        if num_broken_files > max(1, int(self.broken_file_share * num_files)):
            raise DataError(
                f"bad_rows.broken_file_share: {num_broken_files} of {num_files} files cannot be read to their end, more than one and "
                f"more than {self.broken_file_share:g} of them: {_top(reasons)}; fetch them again, or allow a larger share"
            )


@dataclass
class BadRows:
    """What was wrong with the rows that were left out, and how many rows there were."""

    strict: bool = False
    """Raise at the first bad row instead of leaving it out."""
    limits: BadRowLimits | None = None
    """Raise when more than this is bad; None bears everything."""
    num_files: int = 1
    """Files of the corpus, for the share of broken ones."""
    on_bad_row: Callable[[BadRow], None] | None = None
    """Gets every report; without it the first ones are logged."""
    num_rows: int = 0
    """Rows so far, bad ones included."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Bad rows so far by reason."""
    broken_files: set[str] = field(default_factory=set)
    """Files that could not be read to their end."""
    file_rows: int = 0
    """Rows so far of the file that is being read, bad ones included."""
    file_bad_rows: int = 0
    """Bad rows among them."""
    file_reasons: Counter[str] = field(default_factory=Counter)
    """Those that were read since `start_file`, by reason."""

    @property
    def count(self) -> int:
        """Bad rows so far."""
        return self.reasons.total()

    def start_file(self, *, num_rows: int = 0, num_bad_rows: int = 0) -> None:
        """Begins to count for a file, from which an earlier run may have read some rows."""
        self.file_rows, self.file_bad_rows = num_rows, num_bad_rows
        self.file_reasons.clear()

    def good_row(self) -> None:
        """Counts a row that can be used."""
        self.num_rows += 1
        self.file_rows += 1

    def report(
        self,
        path: Path | str,
        line: int,
        reason: str,
        *,
        detail: str = "",
        byte_offset: int | None = None,
        sha256: str | None = None,
        is_end: bool = False,
    ) -> None:
        """Counts one bad row and passes it on.

        Args:
            path: its file.
            line: line of the file.
            reason: what is wrong, in words that many rows share and that hold nothing of the row.
            detail: more for messages, which may show what stood in the row.
            byte_offset: place of the row in the unpacked file.
            sha256: hash of the row.
            is_end: nothing behind this line can be read.

        Raises:
            DataError: in strict mode; or a limit is passed.
        """
        message = printable(f"{path}: line {line}: {reason}" + (f": {detail}" if detail else ""))
        if self.strict:
            raise DataError(f"{message}; mend the row, or leave out the strict setting to skip such rows")
        self.num_rows += 1
        self.file_rows += 1
        self.file_bad_rows += 1
        self.reasons[reason] += 1
        self.file_reasons[reason] += 1
        if is_end:
            self.broken_files.add(str(path))
        if self.on_bad_row is not None:
            self.on_bad_row(BadRow(str(path), line, byte_offset, reason, sha256, is_end))
        elif self.count <= MAX_LOGGED:
            logger.warning("%s (%s skipped)", message, "rest of the file" if is_end else "row")
            if self.count == MAX_LOGGED:
                logger.warning("further bad rows are counted, not shown")
        if self.limits is not None:
            self._check(self.limits, path)

    def _check(self, limits: BadRowLimits, path: Path | str) -> None:
        if self.file_rows >= limits.after_file_rows and self.file_bad_rows > limits.file_share * self.file_rows:
            raise DataError(
                f"bad_rows.file_share: {self.file_bad_rows} of the first {self.file_rows} rows of {printable(path)} are bad, "
                f"more than {limits.file_share:g} of them: {_top(self.file_reasons)}; mend or remove the file, or allow a larger share"
            )
        limits.check(
            num_rows=self.num_rows,
            num_broken_files=len(self.broken_files),
            num_files=self.num_files,
            reasons=self.reasons,
        )


def _top(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(reasons).most_common(3))

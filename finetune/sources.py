"""Where a task's rows come from: a hub data set, a folder in a known layout, or the user's own files.

Files are read by `spade_t5.data.files`: tables without quoting, as GLUE is written (a lone `"` is text; csv's default quoting
silently swallows the rows between two of them); a malformed line is reported and skipped, or ends the run under `strict`.
What the columns mean is the tasks' business.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from spade_t5.data.files import BadRows, read_rows
from spade_t5.errors import ConfigError, DataError
from spade_t5.finetune.task import Row
from spade_t5.messages import reason_of

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A data set of the Hugging Face hub, or a local folder in the hub's layout."""

    name: ClassVar[str] = "hub"
    dataset: str
    """Name on the hub, such as `nyu-mll/glue`, or the path of a folder."""
    subset: str | None = None
    """Configuration of the data set; null: the one the task knows."""
    revision: str | None = None
    """Commit or tag; null: the newest."""

    def rows(self, split: str, subset: str | None = None) -> Iterator[Row]:
        """Rows of a split; `subset` is the task's own configuration, used unless the user names another.

        Raises:
            DataError: the data set or its split cannot be loaded.
        """
        import datasets

        subset = self.subset or subset
        origin = f"{self.dataset}{f'/{subset}' if subset else ''} {split}"
        try:
            table = datasets.load_dataset(self.dataset, subset, split=split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = reason_of(error)
            raise DataError(
                f"data set {origin}: cannot be loaded ({reason}); give local files as the task's source"
            ) from None
        for number, fields in enumerate(table):
            yield Row(fields, f"{origin} row {number}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """A local folder whose layout the task knows, such as GLUE's."""

    name: ClassVar[str] = "folder"
    path: Path
    """The folder."""
    strict: bool = False
    """Stop at a malformed line rather than skip it."""

    def rows(self, file: str) -> Iterator[Row]:
        """Rows of a file of the folder, packed as `.gz` or not.

        Raises:
            DataError: the file is not there, or under `strict` a line is malformed.
        """
        candidates = (self.path / file, self.path / f"{file}.gz")
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise DataError(f"{candidates[0]}: not found, neither plain nor .gz; check the folder of the task's source")
        return file_rows(found[0], strict=self.strict)


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesSource:
    """The user's files, one for each split: `.jsonl`, `.tsv` with a header line (both also as `.gz`), or `.parquet`.

    Without a validation file a share of the training rows is held out: those whose content hashes below `held_out`, so
    the division depends neither on the order of the rows nor on a seed.
    """

    name: ClassVar[str] = "files"
    train: Path
    """Rows to train on."""
    validation: Path | None = None
    """Rows to evaluate on; null: held out from `train`."""
    test: Path | None = None
    """More rows to evaluate on."""
    held_out: float = 0.1
    """Share of `train` held out where there is no validation file, between 0 and 1."""
    strict: bool = False
    """Stop at a malformed line rather than skip it."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out} must lie between 0 and 1")

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of a split.

        Raises:
            ConfigError: there is no file for the split.
            DataError: a file is missing or of an unknown kind, or under `strict` a line is malformed.
        """
        path = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if path is None and split == "test":
            raise ConfigError(
                "task.source.test: no file given for the split 'test'; set it or evaluate on 'validation'"
            )
        if path is not None and (split != "train" or self.validation is not None):
            return file_rows(path, strict=self.strict)
        rows = file_rows(self.train, strict=self.strict)
        return (row for row in rows if (content_share(row) < self.held_out) == (split == "validation"))


def content_share(row: Row) -> float:
    """A number in [0, 1) that depends on the content of a row alone, evenly spread over rows."""
    content = json.dumps(row.fields, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def file_rows(path: Path, *, strict: bool = False) -> Iterator[Row]:
    """Rows of a file, each knowing its line.

    Raises:
        DataError: the file is missing, its kind is unknown, or under `strict` a line is malformed.
    """
    for row in read_rows(path, bad_rows=BadRows(strict=strict)):
        yield Row(row.fields, f"{path} line {row.line}")

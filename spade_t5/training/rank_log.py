"""One log file per rank: everything from INFO on with its time, how the rank ended, and the stacks of a crash.

Until a run begins in earnest its records are kept in memory, so that a refused or finished run leaves no trace in its folder.
"""

import contextlib
import faulthandler
import logging
import logging.handlers
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from spade_t5.checkpoint.manifest import FOLDER_MODE
from spade_t5.errors import RunAbortedError, StopRequestedError, UserError
from spade_t5.messages import OneLineFormatter
from spade_t5.training import distributed

_MAX_RECORDS_IN_MEMORY = 10_000
_EXPECTED = (UserError, RunAbortedError, StopRequestedError)


class LogFile(logging.FileHandler):
    """A log file: each message from INFO on a line of its own, with its time. What a full disk does not take is left out."""

    def __init__(self, path: Path) -> None:
        """Opens the file, to add to it."""
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s"))
        self.setLevel(logging.INFO)

    def handleError(self, record: logging.LogRecord) -> None:
        """Says nothing where the disk fails: the terminal has the message too, and who saves or writes metrics tells of the disk."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Closes the file, whatever the disk says."""
        with contextlib.suppress(OSError):
            super().close()


class RankLog:
    """The log file of this rank, as a context manager."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet.

        Args:
            folder: of the log files of all ranks; made by `open_file`.
        """
        self._path = folder / f"rank-{distributed.rank():05d}.log"
        self._memory = logging.handlers.MemoryHandler(
            _MAX_RECORDS_IN_MEMORY, flushLevel=sys.maxsize, flushOnClose=False
        )
        self._memory.setLevel(logging.INFO)
        self._file: LogFile | None = None
        self._was_enabled = faulthandler.is_enabled()

    def __enter__(self) -> Self:
        """Listens to all loggers."""
        logging.getLogger().addHandler(self._memory)
        return self

    def open_file(self) -> None:
        """Writes what was kept in memory to the file, and everything from now on.

        Raises:
            OSError: it cannot be written, or the run folder is gone.
        """
        self._path.parent.mkdir(FOLDER_MODE, exist_ok=True)
        self._file = LogFile(self._path)
        assert self._file.stream is not None, "it is opened at once"
        faulthandler.enable(self._file.stream)
        self._memory.setTarget(self._file)
        self._memory.flush()
        logging.getLogger().removeHandler(self._memory)
        logging.getLogger().addHandler(self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes how this rank ended, a fault of the program with its traceback, and closes the file."""
        is_fault = isinstance(error, Exception) and not isinstance(error, _EXPECTED)
        if is_fault and self._file is None:
            with contextlib.suppress(OSError):  # which would stand in the place of the fault
                self.open_file()
        if self._file is not None:
            if error is not None:
                self._file.handle(_last_record(error))
            faulthandler.disable()
            if self._was_enabled and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            logging.getLogger().removeHandler(self._file)
            self._file.close()
        logging.getLogger().removeHandler(self._memory)


def _last_record(error: BaseException) -> logging.LogRecord:
    is_expected = isinstance(error, _EXPECTED)
    level = logging.INFO if isinstance(error, StopRequestedError) else logging.ERROR
    return logging.makeLogRecord(
        {
            "name": "spade_t5",
            "levelno": level,
            "levelname": logging.getLevelName(level),
            "msg": "%s",
            "args": (str(error) if is_expected else f"ended by {type(error).__name__}",),
            "exc_info": None if is_expected else (type(error), error, error.__traceback__),
        }
    )

"""One log file per rank: everything from INFO on with its time, how the rank ended, and the stacks of a crash.

Until a run begins in earnest its records are kept in memory, so that a refused or finished run leaves no trace in its folder.
"""

import faulthandler
import logging
import logging.handlers
import sys
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from spade_t5.errors import RunAbortedError, StopRequestedError, UserError
from spade_t5.messages import OneLineFormatter
from spade_t5.training import distributed

FORMAT = "%(asctime)s %(levelname)s %(message)s"
_MAX_RECORDS_IN_MEMORY = 10_000


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
        self._file: logging.StreamHandler[TextIO] | None = None
        self._was_enabled = faulthandler.is_enabled()

    def __enter__(self) -> Self:
        """Listens to all loggers."""
        logging.getLogger().addHandler(self._memory)
        return self

    def open_file(self) -> None:
        """Writes what was kept in memory to the file, and everything from now on."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        stream = self._path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file = logging.StreamHandler(stream)
        self._file.setFormatter(OneLineFormatter(FORMAT))
        self._file.setLevel(logging.INFO)
        faulthandler.enable(stream)
        self._memory.setTarget(self._file)
        self._memory.flush()
        logging.getLogger().removeHandler(self._memory)
        logging.getLogger().addHandler(self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes how this rank ended, a fault of the program with its traceback, and closes the file."""
        is_fault = isinstance(error, Exception) and not isinstance(error, UserError)
        if is_fault and self._file is None:
            self.open_file()
        if self._file is not None:
            if error is not None:
                self._file.handle(_last_record(error))
            faulthandler.disable()
            if self._was_enabled and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            logging.getLogger().removeHandler(self._file)
            self._file.stream.close()
        logging.getLogger().removeHandler(self._memory)


def _last_record(error: BaseException) -> logging.LogRecord:
    is_expected = isinstance(error, (UserError, RunAbortedError, StopRequestedError))
    return logging.makeLogRecord(
        {
            "name": "spade_t5",
            "levelno": logging.ERROR,
            "levelname": "ERROR",
            "msg": "%s",
            "args": (str(error) if is_expected else f"ended by {type(error).__name__}",),
            "exc_info": None if is_expected else (type(error), error, error.__traceback__),
        }
    )

"""TensorBoard's files, beside metrics.jsonl."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("spade_t5")


class TensorBoardFiles:
    """Numbers of a run for TensorBoard; where it is not installed, or its disk fails, the run goes on without."""

    def __init__(self, folder: Path) -> None:
        """Opens a new file in `folder`."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("tensorboard is not installed: metrics go to metrics.jsonl only")
            return
        with self._as_long_as_it_can_be_written():
            self._writer = SummaryWriter(str(folder))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds a point to every curve."""
        with self._as_long_as_it_can_be_written():
            for tag, value in numbers.items() if self._writer is not None else ():
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Closes the file."""
        with self._as_long_as_it_can_be_written():
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _as_long_as_it_can_be_written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            logger.warning("tensorboard: cannot be written (%s): metrics go to metrics.jsonl only", error.strerror)

"""What comes from outside, made fit for messages, logs and files that are passed on: one line, printable, short, without credentials."""

import logging
import re
import reprlib
import sys
import traceback
from pathlib import Path
from types import TracebackType

MAX_MESSAGE_BYTES = 4096
"""Longest message of a log or on the terminal."""

_MAX_SHOWN = 200
_MAX_INTEGER_BITS = 256

# A path that was a URL has one slash left behind the colon.
_USER_OF_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}:/{1,2})[^/\s?#]+@")
_SECRET_PARAMETER = re.compile(
    r"([?&][\w.-]{0,40}(?:token|key|secret|signature|password|credential|sig)[\w.-]{0,40}=)[^&#\s'\",;]+", re.IGNORECASE
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def without_credentials(text: str) -> str:
    """A text whose URLs have lost their user, password and signatures, and whose Hugging Face tokens are masked.

    >>> without_credentials("https://ann:pass@host/file?token=abc&part=2")
    'https://***@host/file?token=***&part=2'
    """
    text = _USER_OF_URL.sub(r"\1***@", text)
    return _HUB_TOKEN.sub("hf_***", _SECRET_PARAMETER.sub(r"\1***", text))


def printable(text: Path | str) -> str:
    """A text for messages, such as a path, on one line: line feeds, escape characters and their like are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(value: object) -> str:
    """A value for messages, as `repr` writes it but short whatever it holds, and on one line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 2 * _MAX_SHOWN else f"{text[: 2 * _MAX_SHOWN]}..."


def one_line(text: str, *, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """A message as it may be shown: printable, without credentials, and at most `max_bytes` long, its middle left out if need be."""
    half = max_bytes // 2 - 8
    # A long text is cut before it is looked through; the ends that are kept may hold half a credential, so they are cut after it too.
    if len(text) > 8 * max_bytes:
        text = f"{text[: 4 * max_bytes]} ... {text[-4 * max_bytes :]}"
    text = printable(without_credentials(text))
    encoded = text.encode("utf-8", "backslashreplace")
    if len(encoded) <= max_bytes:
        return text
    return f"{encoded[:half].decode('utf-8', 'ignore')} ... {encoded[-half:].decode('utf-8', 'ignore')}"


def show_fault(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """Prints a traceback as Python does, each of its lines by `one_line`: what failed may have had credentials in its hands."""
    lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
    print("\n".join(map(one_line, lines)), file=sys.stderr)


class OneLineFormatter(logging.Formatter):
    """Writes every message of a log by `one_line`; a traceback below it keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: "logging._SysExcInfoType") -> str:
        """The lines of a traceback."""
        return "\n".join(one_line(line) for line in super().formatException(ei).splitlines())


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 16
        self.maxstring = self.maxother = _MAX_SHOWN

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_credentials(x), level)

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of many digits.
        return repr(x) if x.bit_length() <= _MAX_INTEGER_BITS else f"<an integer of {x.bit_length()} bits>"


_SHORT = _Short()

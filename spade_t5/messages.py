"""What comes from outside, made fit for messages, logs and files that are passed on: one line, printable, short, without credentials."""

import logging
import re
import reprlib
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

MAX_MESSAGE_BYTES = 4096
"""Longest message of a log or on the terminal."""

_MAX_SHOWN = 200
_MAX_INTEGER_BITS = 256

_WORD = "token|key|apikey|secret|signature|sig|password|passwd|credentials?"
_PASSWORD = (
    r"[^\s/?#:@'\"]{1,200}:(?!\d+/)[^\s?#@'\"]{1,400}"  # may hold slashes; digits and a slash are a port and a path
)
_MASKS = (
    (re.compile(rf"\b([A-Za-z][A-Za-z0-9+.-]{{0,20}}://)(?:[^/\s?#]{{1,600}}|{_PASSWORD})@"), r"\1***@"),
    # A path that was a URL has one slash left behind the colon; without a password it may as well be a path with a version.
    (re.compile(rf"\b([A-Za-z][A-Za-z0-9+.-]{{0,20}}:/){_PASSWORD}@"), r"\1***@"),
    # The word stands alone between signs, or begins with a capital after a small letter: X-Amz-Signature, accessToken, but not max_tokens.
    (
        re.compile(
            rf"([?&][\w.-]{{0,40}}?(?:(?<![A-Za-z0-9])(?i:{_WORD})|(?<=[a-z0-9])(?:Token|Key|Secret|Signature|Password|Credential))"
            r"(?![A-Za-z0-9])[\w.-]{0,40}=)[^&#\s'\",;]+"
        ),
        r"\1***",
    ),
    (
        re.compile(
            r"(?<![A-Za-z0-9])((?:[A-Z0-9]{1,40}_){1,8}(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)['\"]?\s{0,2}[=:]\s{0,2}['\"]?)[^\s'\",;]+"
        ),
        r"\1***",
    ),
    (
        re.compile(
            r"\b((?:Authorization['\"]?\s{0,2}[=:]\s{0,2}['\"]?(?:Basic|Bearer|Token)|Bearer)\s{1,2})[^\s'\",;]{8,}",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "hf_***"),
)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_MIN_SECRET = 8

_secrets: tuple[str, ...] = ()


def hide_secrets_of(variables: Mapping[str, str]) -> None:
    """Has the values of variables named like a token, key, secret or password masked from now on, instead of those named before."""
    global _secrets
    values = {value for name, value in variables.items() if is_secret_name(name)}
    lines = {line.strip() for value in values for line in value.splitlines()}
    _secrets = tuple(sorted((line for line in lines if len(line) >= _MIN_SECRET), key=len, reverse=True))


def is_secret_name(name: str) -> bool:
    """Whether a variable is named like a token, key, secret or password."""
    return _SECRET_VARIABLE.search(name) is not None


def without_credentials(text: str) -> str:
    """A text whose URLs have lost their user, password and signatures, with tokens and the values that `hide_secrets_of` was given masked.

    >>> without_credentials("https://ann:pass@host/file?token=abc&part=2")
    'https://***@host/file?token=***&part=2'
    """
    for secret in _secrets:
        text = text.replace(secret, "***")
    for pattern, mask in _MASKS:
        text = pattern.sub(mask, text)
    return text


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


def reason_of(error: BaseException, *, max_bytes: int = 300) -> str:
    """What an error of a library says, which may be many lines, as a part of a message."""
    return one_line(" ".join(str(error).split()), max_bytes=max_bytes)


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

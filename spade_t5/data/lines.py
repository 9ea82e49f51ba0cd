"""The bytes of a file, local or remote, packed or not, as numbered lines, in bounded memory.

Only what a file really holds decides where it breaks: up to the first byte that cannot be unpacked every line is given, whatever the size
of the blocks that were read. A remote file that cannot be read is opened again behind the last line; the pauses grow.
"""

import hashlib
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, cast

from spade_t5.errors import DataError
from spade_t5.messages import printable

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 8 * 2**20

RETRY_PAUSES_SECONDS = (1.0, 4.0, 16.0, 60.0)
"""Before a remote file that cannot be read is opened again."""
_PACKED_BLOCK_BYTES = 2**16
_ZSTD_PIECE_BYTES = 2**10  # one byte of zstd gives at most about 32 KiB, so a piece at most about 32 MiB
_ZSTD_WINDOW_BYTES = 2**31  # the most that `zstd --long` makes
_BLOCK_BYTES = 2**18


class BrokenFileError(Exception):
    """From some place on the content of a file cannot be read; the message says why."""


class RawLine(NamedTuple):
    """One line of a file."""

    number: int
    """From 1."""
    byte_offset: int
    """Where it begins in the unpacked file."""
    data: bytes | None
    """Its bytes without the line feed; None: it is longer than allowed."""
    sha256: str | None
    """Hash of a line that is longer than allowed; None for others."""


class Numbered(Protocol):
    """Anything with a number that grows through its file."""

    @property
    def number(self) -> int:
        """Its place, from 1."""


N = TypeVar("N", bound=Numbered)


def is_remote(path: Path | str) -> bool:
    """Whether a file is named by a URL."""
    return isinstance(path, str) and "://" in path


def raw_lines(path: Path | str, *, start_line: int = 0, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[RawLine]:
    """The lines of a file behind line `start_line`, unpacked if its name ends in .gz or .zst.

    Raises:
        BrokenFileError: the content cannot be unpacked; all lines before that place have been given.
        DataError: the file cannot be had.
    """

    def read(start: int) -> Iterator[RawLine]:  # packed files have no other start than their own
        with open_binary(path) as file:
            yield from _split(_unpacked(file, str(path)), max_line_bytes)

    return persistently(path, start_line, read)


def persistently(path: Path | str, start: int, read: Callable[[int], Iterator[N]]) -> Iterator[N]:
    """What `read(start)` gives behind number `start`; a remote file is read again a few times before an error in it is believed.

    Raises:
        BrokenFileError: from `read`.
        DataError: the file cannot be had.
    """
    failures, name = 0, printable(path)
    while True:
        try:
            for item in read(start):
                if item.number > start:
                    start, failures = item.number, 0
                    yield item
            return
        except BrokenFileError as error:
            # A connection that ends early looks like a file that does.
            if not is_remote(path) or failures == len(RETRY_PAUSES_SECONDS):
                raise
            reason = str(error)
        except RemoteReadError as error:
            reason = str(error)
            if failures == len(RETRY_PAUSES_SECONDS):
                raise DataError(
                    f"{name}: cannot be read behind line {start}, tried {failures + 1} times: {reason}; start again when it can be reached"
                ) from None
        except OSError as error:
            raise DataError(
                f"{name}: cannot be read: {error.strerror or error}; check the path and its permissions"
            ) from None
        logger.warning(
            "%s: behind line %d: %s; opening it again in %g s", name, start, reason, RETRY_PAUSES_SECONDS[failures]
        )
        time.sleep(RETRY_PAUSES_SECONDS[failures])
        failures += 1


def open_binary(path: Path | str) -> BinaryIO:
    """Opens a local file, or a remote one by fsspec."""
    return cast(BinaryIO, _RemoteFile(str(path))) if is_remote(path) else Path(path).open("rb")


class RemoteReadError(Exception):
    """A remote file could not be opened or read: a matter of the connection, not of what the file holds."""


class _RemoteFile:
    """A remote file whose every failure is a `RemoteReadError`, so that it is told from damage found in the content."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._file = self._tried(lambda: fsspec.open(url, "rb").open())

    def read(self, size: int = -1) -> bytes:
        return self._tried(lambda: self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._tried(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *arguments: object) -> None:
        self.close()

    def _tried(self, call: Callable[[], Any]) -> Any:
        # Each file system has exceptions of its own, without a common base.
        try:
            return call()
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RemoteReadError(f"{type(error).__name__}: {reason}") from None


def _unpacked(file: BinaryIO, name: str) -> Iterator[bytes]:
    if name.endswith(".gz"):
        return _gunzipped(file)
    if name.endswith(".zst"):
        return _unzstd(file, name)
    return iter(lambda: file.read(_BLOCK_BYTES), b"")


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    """Unpacks gzip, of several members too; memory is bounded however well the content packs."""
    member = zlib.decompressobj(wbits=31)
    is_within = True  # an empty file is no gzip file
    while block := file.read(_PACKED_BLOCK_BYTES):
        while block:
            if member.eof:
                block = block.lstrip(b"\0")  # padding between and behind members
                is_within = bool(block)
                if not is_within:
                    break
                member = zlib.decompressobj(wbits=31)
            before = member.copy()
            try:
                unpacked = member.decompress(block, _BLOCK_BYTES)
            except zlib.error as error:
                yield from _until_error(before, block, zlib.error)
                raise BrokenFileError(_gzip_reason(error)) from None
            yield unpacked
            block = member.unused_data if member.eof else member.unconsumed_tail
            is_within = not member.eof
    if is_within:
        raise BrokenFileError("gzip ends too early")


def _until_error(member: Any, block: bytes, error: type[Exception]) -> Iterator[bytes]:
    """What can be unpacked of a block that holds an error: byte by byte, because a call that fails gives nothing."""
    try:
        for place in range(len(block)):
            yield member.decompress(block[place : place + 1])
    except error:
        return


def _gzip_reason(error: zlib.error) -> str:
    reasons = {
        "header check": "not gzip",
        "data check": "gzip checksum differs",
        "length check": "gzip checksum differs",
    }
    return next((reason for words, reason in reasons.items() if words in str(error)), "gzip is damaged")


def _unzstd(file: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{printable(name)}: .zst needs the package zstandard; pip install zstandard, or pack with gzip"
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame, frame_start, place = decompressor.decompressobj(), 0, 0
    is_within = True  # an empty file is no zstd file
    for piece in _pieces(file, _ZSTD_PIECE_BYTES):
        while piece:
            if frame.eof:
                frame, frame_start = decompressor.decompressobj(), place
            try:
                unpacked = frame.decompress(piece)
            except zstandard.ZstdError:
                # A frame cannot be copied as a gzip member can, so it is unpacked a second time up to this piece.
                frame = decompressor.decompressobj()
                file.seek(frame_start)
                for passed in _pieces(file, _ZSTD_PIECE_BYTES, place - frame_start):
                    frame.decompress(passed)
                yield from _until_error(frame, piece, zstandard.ZstdError)
                raise BrokenFileError("zstd is damaged") from None
            yield unpacked
            rest = frame.unused_data if frame.eof else b""
            place += len(piece) - len(rest)
            piece = rest
            is_within = not frame.eof
    if is_within:
        raise BrokenFileError("zstd ends too early")


def _pieces(file: BinaryIO, piece_bytes: int, num_bytes: int | None = None) -> Iterator[bytes]:
    """The next `num_bytes` of a file, or all, in pieces of at most `piece_bytes`."""
    left = sys.maxsize if num_bytes is None else num_bytes
    while block := file.read(min(_PACKED_BLOCK_BYTES, left)):
        left -= len(block)
        for start in range(0, len(block), piece_bytes):
            yield block[start : start + piece_bytes]


def _split(blocks: Iterator[bytes], max_bytes: int) -> Iterator[RawLine]:
    """Cuts blocks at line feeds; of a line above the limit only the hash is kept."""
    number, offset = 1, 0
    parts: list[bytes] = []
    num_bytes = 0
    digest: Any = None  # of the line at hand, once it is too long

    def finished() -> RawLine:
        if digest is not None:
            return RawLine(number, offset, None, digest.hexdigest())
        return RawLine(number, offset, b"".join(parts), None)

    for block in blocks:
        pieces = block.split(b"\n")
        for place, piece in enumerate(pieces):
            parts.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                digest = digest or hashlib.sha256()
                for part in parts:
                    digest.update(part)
                parts.clear()
            if place < len(pieces) - 1:
                yield finished()
                number, offset = number + 1, offset + num_bytes + 1
                num_bytes, digest = 0, None
                parts.clear()
    if num_bytes:
        yield finished()

"""Safetensors files, written from memory in pieces and read in slices.

The writer hashes the memory that it writes and looks for numbers that are not finite on the way, so that each byte crosses the processor
once and no second copy of the tensors is made. The reader takes nothing on trust: the header must be of reasonable size and describe
exactly the bytes that the file has, before anything is allocated.

    8 bytes: length N of the header, little-endian | N bytes: JSON {name: {dtype, shape, data_offsets: [begin, end]}} | the tensors
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from spade_t5.checkpoint.manifest import create
from spade_t5.errors import DataError

MAX_HEADER_BYTES = 8 << 20
"""Some 60,000 tensors; a larger header is not of our making."""
PIECE_BYTES = 4 << 20
"""Hashed, checked and written at once; a piece stays in the processor's cache meanwhile."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HostTensor(NamedTuple):
    """A tensor in host memory, which may lie there in several parts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[Tensor]
    """Its elements in order, 1-D and contiguous."""

    @property
    def num_bytes(self) -> int:
        """Size of the elements."""
        return sum(part.nbytes for part in self.parts)


class WrittenFile(NamedTuple):
    """What came of writing a file."""

    entry: dict[str, Any]
    """For the manifest: size, and the hash of the memory that was written."""
    hash_seconds: float
    """Spent on hashing and looking at the numbers."""
    sync_seconds: float
    """Spent on forcing the file to disk."""


def write_tensors(path: Path, tensors: Mapping[str, HostTensor]) -> WrittenFile:
    """Writes a new file and forces it to disk.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor holds a number that is not finite; it is named.
    """
    digest = hashlib.sha256()
    hash_seconds = 0.0
    num_bytes = 0
    with create(path) as file:
        for name, piece in _pieces(tensors):
            started = time.perf_counter()
            if name is not None and not _is_finite(piece):
                raise ValueError(f"{name} holds numbers that are not finite")
            rest = piece.view(torch.uint8).numpy().data
            digest.update(rest)
            hash_seconds += time.perf_counter() - started
            num_bytes += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        started = time.perf_counter()
        os.fsync(file.fileno())
        sync_seconds = time.perf_counter() - started
    return WrittenFile({"bytes": num_bytes, "sha256": digest.hexdigest()}, hash_seconds, sync_seconds)


def _pieces(tensors: Mapping[str, HostTensor]) -> Iterator[tuple[str | None, Tensor]]:
    """The content of a file: the header under the name None, then the tensors in pieces, wide dtypes first so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield None, torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    for name in order:
        for part in tensors[name].parts:
            numel = PIECE_BYTES // part.itemsize
            for start in range(0, part.numel(), numel):
                yield name, part[start : start + numel]


def _is_finite(piece: Tensor) -> bool:
    """Whether all numbers are finite; NumPy does it in this thread, where torch would wake the threads that training computes with."""
    if not piece.is_floating_point() or not piece.numel():
        return True
    numbers = (piece.float() if piece.dtype == torch.bfloat16 else piece).numpy()
    return bool(np.isfinite(numbers.min()) and np.isfinite(numbers.max()))  # NaN is both


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""


class TensorFile:
    """Reads one file."""

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its header against its size.

        Raises:
            DataError: it cannot be read, or is no safetensors file; the message names it.
        """
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from None
        try:
            self._entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The file, open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def names(self) -> list[str]:
        """Names of its tensors."""
        return list(self._entries)

    def numel(self, name: str) -> int:
        """Number of elements of a tensor.

        Raises:
            DataError: there is no such tensor.
        """
        return _numel(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor.

        Raises:
            DataError: there is no such tensor.
        """
        return self._entry(name).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start:stop of a flattened tensor; without a `stop` the whole tensor in its shape.

        Raises:
            DataError: there is no such tensor or no such part of it, or it cannot be read.
        """
        dtype, shape, begin = self._entry(name)
        numel = _numel(shape)
        if not 0 <= start <= (numel if stop is None else stop) <= numel:
            raise DataError(f"{self._path}: {name} has {numel} elements, asked for {start}:{stop}; refused")
        result = torch.empty((numel if stop is None else stop) - start, dtype=dtype)
        if result.numel():
            self._fill(result.view(torch.uint8).numpy().data, begin + start * dtype.itemsize)
        return result.view(shape) if stop is None and start == 0 else result

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise DataError(f"{self._path}: holds no tensor {name!r}; use another checkpoint")
        return self._entries[name]

    def _fill(self, memory: memoryview, position: int) -> None:
        while memory:
            try:
                count = os.preadv(self._descriptor, [memory[: 1 << 30]], position)
            except OSError as error:
                raise DataError(f"{self._path}: cannot be read ({error.strerror}); use another checkpoint") from None
            if count == 0:
                raise DataError(f"{self._path}: ends too early; use another checkpoint")
            memory, position = memory[count:], position + count

    def _read_header(self) -> dict[str, _Entry]:
        num_bytes = os.fstat(self._descriptor).st_size
        prefix = bytearray(8)
        if num_bytes < len(prefix):
            raise self._not_safetensors(f"{num_bytes} bytes")
        self._fill(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > min(num_bytes - len(prefix), MAX_HEADER_BYTES):
            raise self._not_safetensors(f"a header of {length} bytes")
        text = bytearray(length)
        self._fill(memoryview(text), len(prefix))
        try:
            header = json.loads(text, object_pairs_hook=_without_repetition)
            entries = {
                str(name): _Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            spans = sorted((*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise self._not_safetensors("a header that makes no sense") from None
        self._check_spans(entries, spans, num_bytes - len(prefix) - length)
        return {name: entry._replace(begin=len(prefix) + length + entry.begin) for name, entry in entries.items()}

    def _check_spans(self, entries: dict[str, _Entry], spans: list[Any], num_bytes: int) -> None:
        """The tensors must follow on each other without gap or overlap, and end where the file ends."""
        place = 0
        for span in spans:
            name = span[-1]
            entry = entries[name]
            if len(span) != 3 or not all(type(number) is int and number >= 0 for number in (*entry.shape, *span[:2])):
                raise self._not_safetensors(f"{name} with shape or offsets that are no numbers")
            if span[0] != place or span[1] - span[0] != _numel(entry.shape) * entry.dtype.itemsize:
                raise self._not_safetensors(f"{name} at bytes {span[0]} to {span[1]}, which do not fit")
            place = span[1]
        if place != num_bytes:
            raise self._not_safetensors(f"tensors of {place} bytes in all, in a file with {num_bytes} bytes for them")

    def _not_safetensors(self, found: str) -> DataError:
        return DataError(f"{self._path}: not a safetensors file, it has {found}; use another checkpoint")


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for length in shape:
        result *= length
    return result


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result

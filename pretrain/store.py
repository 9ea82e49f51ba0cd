"""The token store: a corpus as token ids on disk, read through memory maps.

A store is a folder of Arrow files with a manifest. A shard holds one column of lists, one list for each document; its values are the flat token ids
(16 bits if the vocabulary allows) and its offsets the places where documents begin. Documents lie end to end, across shards too, so
position t of a split is a token whatever shard it is in, and a stretch of any length is one slice or the join of a few.

The manifest says what the store was made of and by which tokenizer, how much each split holds, and the hash of every file and its own. It is
written last, and the folder gets its name after that: a store that can be opened is complete.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spade_t5.checkpoint.manifest import check_file, content_hash, file_sha256, whole_file
from spade_t5.errors import ConfigError, DataError
from spade_t5.messages import shown
from spade_t5.pretrain.encoding import Tokens

FORMAT = 2
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
SPLITS = ("train", "validation")
_MAX_MANIFEST_BYTES = 2**28
_DTYPES = ("uint16", "uint32")


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What rows need to know of the tokenizer that made a store."""

    hash: str
    """`tokenizer_hash` of it."""
    vocab_size: int
    """Rows of the embedding of a model for it."""
    pad_token_id: int
    """Id of the padding token."""
    eos_token_id: int
    """Id of the end-of-sequence token."""
    sentinel_ids: tuple[int, ...]
    """Ids of the sentinels in order of use."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a split."""

    file: str
    """Name within the store."""
    num_tokens: int
    """Tokens in it."""
    num_documents: int
    """Documents in it."""
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Hash of the file."""


class TokenStore:
    """A token store opened for reading; pickles to its path, so loader processes map the files themselves."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        if manifest["dtype"] not in _DTYPES:
            raise ValueError(f"dtype: {manifest['dtype']!r} is not one of {', '.join(_DTYPES)}")
        info = dict(manifest["tokenizer"])
        self.tokenizer = TokenizerInfo(**{**info, "sentinel_ids": tuple(info["sentinel_ids"])})
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, *self.tokenizer.sentinel_ids)
        shards = [Shard(**shard) for name in SPLITS for shard in manifest["splits"][name]]
        counts = [count for shard in shards for count in (shard.num_tokens, shard.num_documents, shard.num_bytes)]
        if not all(
            type(number) is int and 0 <= number < 2**63 for number in (self.tokenizer.vocab_size, *ids, *counts)
        ):
            raise ValueError("holds counts that are none")
        if max(ids) >= self.tokenizer.vocab_size:
            raise ValueError("holds ids that are beyond the vocabulary")
        self._splits = {
            name: StoreSplit(
                path, name, [Shard(**shard) for shard in manifest["splits"][name]], np.dtype(manifest["dtype"])
            )
            for name in SPLITS
        }

    @classmethod
    def open(cls, path: Path | str, *, tokenizer_hash: str | None = None) -> "TokenStore":
        """Opens a store.

        Args:
            path: its folder.
            tokenizer_hash: hash of the tokenizer that the model will be used with.

        Raises:
            DataError: there is no complete store there, or a shard has another size than the manifest says.
            ConfigError: the store was made by another tokenizer.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            store = cls(path, manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise DataError(
                f"{path / MANIFEST}: damaged, it is not of the expected shape; make the store again"
            ) from None
        if tokenizer_hash is not None:
            store.check_tokenizer(tokenizer_hash)
        for split in store._splits.values():
            for shard in split.shards:
                file = path / shard.file
                size = file.stat().st_size if file.is_file() else None
                if size != shard.num_bytes:
                    raise DataError(f"{file}: {size} bytes, the manifest says {shard.num_bytes}; make the store again")
        return store

    @property
    def identity(self) -> str:
        """Hash of the manifest, and so of everything in the store."""
        return content_hash(self.manifest)

    def files(self) -> dict[str, tuple[int, str]]:
        """Size and hash of every file but the manifest, by its name within the store."""
        return listed_files(self.manifest)

    def split(self, name: str) -> "StoreSplit":
        """The tokens of `train` or `validation`."""
        if name not in self._splits:
            raise ValueError(f"split: {name!r} is not one of {', '.join(SPLITS)}")
        return self._splits[name]

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Fails if the store was made by another tokenizer.

        Raises:
            ConfigError: naming both.
        """
        if tokenizer_hash != self.tokenizer.hash:
            raise ConfigError(
                f"{self.path}: made with tokenizer {self.tokenizer.hash[:12]}, not with {tokenizer_hash[:12]}; "
                "use the tokenizer in the store's folder, or prepare the corpus again"
            )

    def verify(self) -> None:
        """Reads every file and compares its hash with the manifest, which must name all that is there and count it rightly.

        Raises:
            DataError: a file differs, is missing, is a link, or is not in the manifest; or a shard holds something else than it says.
        """
        files = self.files()
        link = next((file for file in sorted(self.path.rglob("*")) if file.is_symlink()), None)
        if link is not None:
            raise DataError(f"{link}: is a link, and a store holds plain files alone; put the file itself there")
        for name, (num_bytes, sha256) in files.items():
            check_file(self.path, name, {"bytes": num_bytes, "sha256": sha256})
        found = {str(file.relative_to(self.path).as_posix()) for file in self.path.rglob("*") if not file.is_dir()}
        extra = sorted(found - set(files) - {MANIFEST})
        if extra:
            raise DataError(
                f"{self.path}: {len(extra)} files are not in the manifest, such as {extra[0]}; remove them, or make the store again"
            )
        for split in self._splits.values():
            split.check_counts()

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenStore, (self.path, self.manifest))


class StoreSplit:
    """One split of a store: flat token ids of all shards as if they were one array."""

    def __init__(self, path: Path, name: str, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.path, self.name, self.shards, self.dtype = path, name, shards, dtype
        self._first_token = [0, *np.cumsum([shard.num_tokens for shard in shards]).tolist()]
        self._first_document = [0, *np.cumsum([shard.num_documents for shard in shards]).tolist()]
        self._mapped: dict[int, tuple[Tokens, NDArray[np.int64]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # other processes map the files themselves

    @property
    def num_tokens(self) -> int:
        """Tokens in the split."""
        return int(self._first_token[-1])

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return int(self._first_document[-1])

    def tokens(self, start: int, stop: int) -> Tokens:
        """Token ids at positions start .. stop - 1; a view of the memory map where they lie in one shard.

        Raises:
            ValueError: the range is not within the split.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start} .. {stop} are not in split {self.name!r} of {self.num_tokens} tokens")
        parts: list[Tokens] = []
        shard = bisect_right(self._first_token, start) - 1
        while start < stop:
            first, end = self._first_token[shard], self._first_token[shard + 1]
            parts.append(self._values(shard)[start - first : min(stop, end) - first])
            start, shard = min(stop, end), shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tokens:
        """Token ids of several stretches, end to end; stretch i is tokens starts[i] .. starts[i] + lengths[i] - 1.

        Raises:
            ValueError: a stretch is not within the split.
        """
        stops = starts + lengths
        if len(starts) and not (starts.min() >= 0 and lengths.min() >= 0 and stops.max() <= self.num_tokens):
            raise ValueError(f"a stretch is not in split {self.name!r} of {self.num_tokens} tokens")
        if not self.num_tokens:
            return np.empty(0, self.dtype)
        shards = np.minimum(np.searchsorted(self._first_token, starts, side="right"), self.num_shards) - 1
        firsts = np.asarray(self._first_token)[shards]
        ends = np.asarray(self._first_token)[shards + 1]
        # One slice for each stretch; what is looked up for it is looked up for all at once, since stretches are short.
        parts = [
            self._values(shard)[start:stop] if is_within else self.tokens(first + start, first + stop)
            for shard, first, start, stop, is_within in zip(
                shards.tolist(),
                firsts.tolist(),
                (starts - firsts).tolist(),
                (stops - firsts).tolist(),
                (stops <= ends).tolist(),
                strict=True,
            )
        ]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def documents(self, numbers: NDArray[np.int64]) -> tuple[Tokens, NDArray[np.int64]]:
        """Token ids of several documents, end to end, and the length of each.

        Raises:
            ValueError: there is no such document.
        """
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < self.num_documents):
            raise ValueError(f"a document is not in split {self.name!r} of {self.num_documents} documents")
        starts, stops = np.empty_like(numbers), np.empty_like(numbers)
        shards = np.searchsorted(self._first_document, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            local = numbers[here] - self._first_document[shard]
            offsets = self.shard_offsets(shard)
            starts[here] = offsets[local] + self._first_token[shard]
            stops[here] = offsets[local + 1] + self._first_token[shard]
        return self.gather(starts, stops - starts), stops - starts

    @property
    def num_shards(self) -> int:
        """Files of the split."""
        return len(self.shards)

    def first_token(self, shard: int) -> int:
        """Position of a shard's first token in the split."""
        return int(self._first_token[shard])

    def check_counts(self) -> None:
        """Compares what the shards hold with what the manifest says of them.

        Raises:
            DataError: naming a shard that holds something else.
        """
        for number, shard in enumerate(self.shards):
            file = self.path / shard.file
            values, offsets = self._map(number)
            found = (len(offsets) - 1, len(values), int(offsets[-1]), values.dtype)
            if found != (shard.num_documents, shard.num_tokens, shard.num_tokens, self.dtype):
                raise DataError(
                    f"{file}: {len(offsets) - 1} documents and {len(values)} tokens of type {values.dtype}, the manifest says "
                    f"{shard.num_documents} and {shard.num_tokens} of type {self.dtype}; make the store again"
                )
            if (np.diff(offsets) < 0).any():
                raise DataError(f"{file}: its documents do not lie end to end; make the store again")

    def shard_offsets(self, shard: int) -> NDArray[np.int64]:
        """Where the documents of a shard begin, in tokens from its first, and where the last ends; a view of the memory map."""
        return self._map(shard)[1]

    def document(self, number: int) -> Tokens:
        """Token ids of one document.

        Raises:
            ValueError: there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise ValueError(f"document {number} is not in split {self.name!r} of {self.num_documents} documents")
        shard = bisect_right(self._first_document, number) - 1
        values, offsets = self._map(shard)
        local = number - self._first_document[shard]
        return values[offsets[local] : offsets[local + 1]]

    def _values(self, shard: int) -> Tokens:
        return self._map(shard)[0]

    def _map(self, shard: int) -> tuple[Tokens, NDArray[np.int64]]:
        if shard not in self._mapped:
            import pyarrow

            file = self.path / self.shards[shard].file
            try:
                with pyarrow.memory_map(str(file)) as source:
                    column = pyarrow.ipc.open_file(source).get_batch(0).column(0)
                column.validate()  # what Arrow reads may point outside of the file
                self._mapped[shard] = (column.values.to_numpy(), column.offsets.to_numpy())
            except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError, AttributeError):
                raise DataError(f"{file}: no shard of a token store; make the store again") from None
        return self._mapped[shard]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, checked against its own hash.

    Raises:
        DataError: there is none, it is damaged or of another format, or it names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {_MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: not a token store (no {MANIFEST}); make one with `spade-t5 prepare`") from None
    except (ValueError, OSError, RecursionError):
        raise DataError(f"{path}: damaged or not readable; make the store again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise DataError(f"{folder}: token store of format {shown(found)}, expected {FORMAT}; make it again")
    if manifest.pop("sha256", None) != content_hash(manifest):
        raise DataError(f"{path}: damaged, its content differs from its own hash; make the store again")
    try:
        names = list(listed_files(manifest))
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: damaged, it is not of the expected shape; make the store again") from None
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) and name.isprintable() else ()
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name:
            raise DataError(f"{path}: names {shown(name)}, which is not a file within the store; refused")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any], *, scratch: Path | None = None) -> None:
    """Writes the manifest of a store with its own hash; unfinished in `scratch`, as `whole_file`."""
    write_json(folder / MANIFEST, {**manifest, "sha256": content_hash(manifest)}, scratch=scratch)


def listed_files(manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Size and hash of the files that a manifest names."""
    shards = {
        shard["file"]: (shard["num_bytes"], shard["sha256"]) for split in SPLITS for shard in manifest["splits"][split]
    }
    return {**shards, **{name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}}


def is_token_store(folder: Path) -> bool:
    """Whether a folder is a token store rather than another kind of folder with a manifest, whatever state it is in."""
    try:
        if "splits" in json.loads((folder / MANIFEST).read_text(encoding="utf-8")):
            return True
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return any(folder.glob("shard-*.arrow"))


def write_json(path: Path, content: Mapping[str, Any], *, scratch: Path | None = None) -> None:
    """Writes a file that is there whole or not at all; unfinished in `scratch`, as `whole_file`."""
    with whole_file(path, scratch=scratch) as file:
        file.write(json.dumps(content, indent=1).encode())


def write_shard(path: Path, documents: Sequence[Tokens], dtype: np.dtype[Any], *, scratch: Path | None = None) -> Shard:
    """Writes one shard, whole or not at all, and waits until it is on disk; the same documents give the same bytes.

    Args:
        path: its file.
        documents: what it holds.
        dtype: of its tokens.
        scratch: where it is unfinished, as `whole_file`.
    """
    import pyarrow

    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(tokens) for tokens in documents], out=offsets[1:])
    values = np.concatenate(documents).astype(dtype, copy=False)
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
    batch = pyarrow.record_batch([column], names=["tokens"])
    with whole_file(path, scratch=scratch) as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    return Shard(path.name, int(offsets[-1]), len(documents), path.stat().st_size, file_sha256(path))

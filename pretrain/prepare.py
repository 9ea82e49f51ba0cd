"""From a corpus to a token store: in parallel over processes and nodes, restartable, the same bytes whoever did what.

The corpus is divided into units of files, and units into parts with a record each (`shards.py`). All of it happens in `<out>.partial`: shards and
tokenizer in `store/`, records in `progress/`. When every unit is done, the bad rows of all records become `quarantine.jsonl`, the manifest is
written, and `store/` gets its final name. A run that was killed goes on behind its records. Nodes share the folder: unit u belongs to node
u mod num_nodes, and the node that finds all units done publishes the store.

Documents follow each other without a separator, as in Google's T5, where EOS ends inputs and targets only; Hugging Face's and nanoT5's scripts put
EOS behind every document. `append_eos` does the latter; losses of the two differ a little.
"""

import json
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from spade_t5.checkpoint.manifest import file_entry, publish, unique_name, whole_file
from spade_t5.data.bad_rows import MAX_LOGGED, BadRow, BadRowLimits
from spade_t5.data.processes import worker_pool
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.tokenizer import load_tokenizer, model_vocab_size, sentinel_ids, tokenizer_hash
from spade_t5.messages import printable
from spade_t5.pretrain.corpora import CorpusConfig
from spade_t5.pretrain.encoding import TextEncoder, Tokens
from spade_t5.pretrain.progress import PrepareProgress, UnitCounters
from spade_t5.pretrain.shards import (
    RECORD_FORMAT,
    Encode,
    Part,
    Placed,
    Unit,
    UnitJob,
    encode_here,
    units_of,
    write_unit,
)
from spade_t5.pretrain.store import (
    FORMAT,
    MANIFEST,
    QUARANTINE,
    SPLITS,
    TokenizerInfo,
    TokenStore,
    write_json,
    write_manifest,
)

_UNIT_BYTES = 2**26
# A small corpus is done before worker processes have started.
_SERIAL_CHARACTERS = 8_000_000
_SETTINGS = "settings.json"
_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """How a corpus becomes a token store."""

    corpus: CorpusConfig
    """Text to tokenise."""
    tokenizer: str
    """Tokenizer folder, SentencePiece `.model` file, or name of a Hugging Face T5 tokenizer."""
    out: Path
    """Folder of the store."""
    num_sentinels: int | None = None
    """Append sentinels to the tokenizer up to this number; null keeps what it has."""
    held_out_fraction: float = 0.005
    """Share of the documents in the validation split, chosen by a hash of their text; a corpus with splits of its own keeps them."""
    shard_tokens: int = 2**26
    """Tokens in one part, both splits together; what a restart does again at most in each process."""
    append_eos: bool = False
    """Put EOS behind each document, as Hugging Face's and nanoT5's scripts do; Google's T5 does not."""
    max_documents: int | None = None
    """Stop behind this many documents; null: none."""
    num_processes: int | None = None
    """Processes that work on this node; null: one for each core that this process may use."""
    num_nodes: int = 1
    """Nodes that work on the store together, in a folder that all of them see."""
    node: int = 0
    """Which of them this is, from 0."""
    bad_rows: BadRowLimits = BadRowLimits()  # noqa: RUF009 - frozen
    """How much of the corpus may be bad before preparation stops; what is finished is kept."""
    strict: bool = False
    """Stop at the first bad row instead of leaving it out."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction: {self.held_out_fraction} must be at least 0 and below 1")
        for name in ("num_sentinels", "shard_tokens", "max_documents", "num_processes", "num_nodes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.node < self.num_nodes:
            raise ValueError(f"node: {self.node} must lie between 0 and num_nodes - 1, {self.num_nodes - 1}")
        if self.max_documents is not None and self.num_nodes > 1:
            raise ValueError(
                f"max_documents: {self.max_documents} documents are taken in order by one node; set num_nodes=1"
            )


def prepare(config: PrepareConfig) -> Path | None:
    """Makes the token store, or goes on with one that was interrupted.

    Returns:
        The folder of the store, which holds the tokenizer too, in `tokenizer/`. None if units of other nodes are still missing, which is
        logged; the node that finishes last publishes the store.

    Raises:
        ConfigError: a store with other settings is there already, finished or begun, or something that is no store.
        DataError: the corpus is missing, empty, or bad beyond the limits; in strict mode also at the first bad row. Or the store cannot be
            written, or a worker process was killed.
    """
    out = _place(config.out)
    tokenizer = load_tokenizer(config.tokenizer, num_sentinels=config.num_sentinels)
    corpus = config.corpus.open()
    units = units_of(corpus.files, _UNIT_BYTES)
    settings = {
        "corpus": corpus.fingerprint,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "unit_bytes": _UNIT_BYTES,
        **{
            name: getattr(config, name) for name in ("held_out_fraction", "shard_tokens", "append_eos", "max_documents")
        },
    }
    work = out.with_name(f"{out.name}.partial")
    if out.exists():
        _check_published(out, settings)
        shutil.rmtree(work, ignore_errors=True)
        return config.out
    job = UnitJob(
        corpus=corpus,
        encoder=TextEncoder(tokenizer, append_eos=config.append_eos),
        store=work / "store",
        progress=work / "progress",
        held_out_fraction=config.held_out_fraction,
        shard_tokens=config.shard_tokens,
        strict=config.strict,
        limits=config.bad_rows,
    )
    try:
        _begin(job, settings)
        if not out.exists() and not _write(job, units, settings, tokenizer, out, config):
            return None
    except (DataError, OSError, BrokenProcessPool) as error:
        # Another command at work on the same store may have published it, and so have taken the folder away from this one.
        if not out.exists():
            _give_up(job, units, config, error)
            raise
    shutil.rmtree(work, ignore_errors=True)
    _check_published(out, settings)
    return config.out


def _place(out: Path) -> Path:
    """Where the store goes, links followed: what is begun lies beside it.

    Raises:
        ConfigError: there is something else, or nothing can be there.
    """
    try:
        place = out.resolve()
        if place.exists() and not (place / MANIFEST).exists():
            raise ConfigError(f"out: {out} exists and is no token store; remove it or choose another folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"out: {out} cannot be a folder: {reason}; choose another one") from None
    return place


def _begin(job: UnitJob, settings: dict[str, Any]) -> None:
    """Makes the folders, or checks that they were made for the same store; several commands may do so at once.

    The folder of the records gets its name with the settings in it, which only one command can do; all others must want the same.
    """
    work, path = job.progress.parent, job.progress / _SETTINGS
    settings = {**settings, "record_format": RECORD_FORMAT}
    if not path.exists():
        own = work / unique_name("progress")
        own.mkdir(parents=True)
        write_json(own / _SETTINGS, settings)
        try:
            own.rename(job.progress)
        except OSError:
            shutil.rmtree(own)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: missing or damaged; remove {work} and start again")
    _check_settings(work, found, settings)
    job.store.mkdir(exist_ok=True)


def _write(
    job: UnitJob,
    units: Sequence[Unit],
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    config: PrepareConfig,
) -> bool:
    """Writes the units of this node, and publishes the store if there are no others left; returns whether there were none."""
    mine = [unit for unit in units if unit.number % config.num_nodes == config.node]
    _write_units(job, mine, config)
    parts = {unit: job.parts(unit.number) for unit in units}
    if config.max_documents is None or config.max_documents != sum(
        part.num_documents for parts_of_unit in parts.values() for part in parts_of_unit
    ):
        missing = [unit for unit in units if not _is_finished(parts[unit])]
        if any(unit in missing for unit in mine):
            raise DataError(f"{job.store}: shards were removed while others were made; start again")
        if missing:
            _say_missing(missing, config)
            return False
    _Watch(job, units, logs=False).look()  # the limits hold for all nodes together
    _publish(job, [part for unit in units for part in parts[unit]], settings, tokenizer, out)
    return True


def _give_up(job: UnitJob, units: Sequence[Unit], config: PrepareConfig, error: Exception) -> None:
    """Says in one line what a user can mend; what is finished stays.

    Raises:
        DataError: a disk is full, a folder cannot be written, or a worker was killed.
    """
    if isinstance(error, BrokenProcessPool):
        raise DataError(
            "num_processes: a worker process was killed, probably for lack of memory; start again with fewer, finished parts are kept"
        ) from None
    if isinstance(error, OSError) and error.errno is not None:
        raise DataError(
            f"out: {error.filename or config.out}: {error.strerror}; make room or choose another folder, finished parts are kept"
        ) from None
    is_begun = any(part.num_tokens for unit in units for part in job.parts(unit.number))
    if isinstance(error, DataError) and config.num_nodes == 1 and not is_begun:
        shutil.rmtree(job.store.parent, ignore_errors=True)  # nothing in it is worth going on from


def _write_units(job: UnitJob, units: Sequence[Unit], config: PrepareConfig) -> None:
    """Writes what is missing of the units: each in a process of its own, or all in this one with help for the encoding."""
    processes = config.num_processes or _usable_cores()
    watch = _Watch(job, units, logs=True)
    watch.look()
    left = [unit for unit in units if not _is_finished(job.parts(unit.number))]
    with PrepareProgress(job.corpus.files, left) as progress:
        if config.max_documents is None and processes > 1 and len(left) >= processes:
            _write_in_processes(job, left, processes, progress, watch)
        else:
            _write_here(job, left, processes, progress, watch, config.max_documents)
    watch.look()


def _write_here(
    job: UnitJob,
    units: Sequence[Unit],
    processes: int,
    progress: PrepareProgress,
    watch: "_Watch",
    max_documents: int | None,
) -> None:
    with _Encoders(job.encoder, processes) as encode:
        for place, unit in enumerate(units):
            left = None if max_documents is None else max_documents - watch.num_documents
            if left == 0:
                return

            for step in write_unit(job, unit, encode, max_documents=left):
                progress.counters.add(place, step)
                progress.show()
                if step.ends_part:
                    watch.look()


def _write_in_processes(
    job: UnitJob, units: Sequence[Unit], processes: int, progress: PrepareProgress, watch: "_Watch"
) -> None:
    with worker_pool(processes, _start_unit_writer, (job, progress.counters)) as pool:
        futures = [pool.submit(_write_unit, place, unit) for place, unit in enumerate(units)]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                progress.show()
                watch.look()
        except BaseException:
            progress.counters.stop()  # what the others have begun would be waited for, however long it takes
            pool.shutdown(cancel_futures=True)
            raise


class _Watch:
    """Looks at finished parts, in the order of units and parts whoever finishes first, and stops when too much is bad.

    Args:
        job: how units are written.
        units: which ones to look at.
        logs: whether to show the first bad rows.
    """

    def __init__(self, job: UnitJob, units: Sequence[Unit], *, logs: bool) -> None:
        self._job, self._logs = job, logs
        self._units = deque(unit.number for unit in units)
        self._part = 0
        self.num_documents = self.num_rows = self.num_broken_files = 0
        self.reasons: Counter[str] = Counter()

    def look(self) -> None:
        """Takes the parts that have been finished since the last look.

        Raises:
            DataError: too much is bad, or anything in strict mode.
        """
        while self._units and (part := self._job.part(self._units[0], self._part)) is not None:
            self._take(part)
            self._part += 1
            if part.is_last:
                self._units.popleft()
                self._part = 0

    def _take(self, part: Part) -> None:
        for row in part.bad_rows:
            if self._logs and self.reasons.total() < MAX_LOGGED:
                logger.warning("%s: line %d: %s (left out)", printable(row.file), row.line, row.reason)
            self.reasons[row.reason] += 1
            self.num_broken_files += row.is_end
        self.num_documents += part.num_documents
        self.num_rows += part.num_rows
        if self._job.strict and part.bad_rows:
            row = part.bad_rows[0]
            raise DataError(
                f"{printable(row.file)}: line {row.line}: {row.reason}; mend the row and start anew, or leave out the strict setting"
            )
        self._job.limits.check(
            num_rows=self.num_rows,
            num_broken_files=self.num_broken_files,
            num_files=len(self._job.corpus.files),
            reasons=self.reasons,
        )


class _Encoders:
    """Encodes batches in this process, and after enough text in worker processes, which work on a bounded number of batches ahead."""

    def __init__(self, encoder: TextEncoder, processes: int) -> None:
        self._encoder, self._processes = encoder, processes
        self._here = encode_here(encoder)
        self._characters = 0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encode:
        return self._encode

    def __exit__(self, *arguments: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _encode(self, batches: Iterable[Sequence[Placed]]) -> Iterator[tuple[Placed, Tokens]]:
        batches = iter(batches)
        while self._processes == 1 or self._characters < _SERIAL_CHARACTERS:
            batch = next(batches, None)
            if batch is None:
                return
            self._characters += sum(len(placed.document.text) for placed in batch)
            yield from self._here([batch])
        if self._pool is None:
            self._pool = worker_pool(self._processes, _start_encoder, (self._encoder,))
        under_way: deque[tuple[Sequence[Placed], Future[list[Tokens]]]] = deque()
        for batch in batches:
            texts = [placed.document.text for placed in batch]
            under_way.append((batch, self._pool.submit(_encode, texts)))
            if len(under_way) > 4 * self._processes:
                first, future = under_way.popleft()
                yield from zip(first, future.result(), strict=True)
        for first, future in under_way:
            yield from zip(first, future.result(), strict=True)


def _usable_cores() -> int:
    """Cores that this process may run on, which a batch system or a container may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_finished(parts: Sequence[Part]) -> bool:
    return bool(parts) and parts[-1].is_last


def _say_missing(missing: Sequence[Unit], config: PrepareConfig) -> None:
    nodes = sorted({unit.number % config.num_nodes for unit in missing})
    logger.warning(
        "node %d of %d is done; the store is published when %d units more are done, of nodes %s",
        config.node,
        config.num_nodes,
        len(missing),
        ", ".join(map(str, nodes)),
    )


def _publish(
    job: UnitJob,
    parts: Sequence[Part],
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
) -> None:
    """Adds tokenizer, quarantine and manifest and gives the store its name.

    Several commands may do so at once: each file is put in place whole, with the same bytes by all, until one has taken the folder away.

    Raises:
        OSError: another was faster.
        DataError: there is nothing to publish.
    """
    bad_rows = [row for part in parts for row in part.bad_rows]
    if not any(part.num_tokens for part in parts):
        raise DataError(f"corpus: no document with text, {len(bad_rows)} bad rows; check the files and the text field")
    _write_quarantine(job, bad_rows)
    files = [job.store / QUARANTINE, *_write_tokenizer(job, tokenizer)]
    write_manifest(
        job.store,
        {
            "format": FORMAT,
            "dtype": job.encoder.dtype.name,
            "tokenizer": asdict(_tokenizer_info(tokenizer)),
            "settings": settings,
            "splits": {
                split: [asdict(part.shards[split]) for part in parts if split in part.shards] for split in SPLITS
            },
            "files": {str(file.relative_to(job.store)): file_entry(file) for file in sorted(files)},
            "num_documents": sum(part.num_documents for part in parts),
            "num_empty_documents": sum(part.num_empty_documents for part in parts),
            "num_bad_rows": len(bad_rows),
            "num_broken_files": sum(row.is_end for row in bad_rows),
            "bad_rows_by_reason": dict(sorted(Counter(row.reason for row in bad_rows).items())),
        },
        scratch=job.progress,
    )
    publish(job.store, out)
    if bad_rows:
        logger.warning("%d bad rows of the corpus were left out; %s names them", len(bad_rows), out / QUARANTINE)


def _tokenizer_info(tokenizer: PreTrainedTokenizerFast) -> TokenizerInfo:
    return TokenizerInfo(
        hash=tokenizer_hash(tokenizer),
        vocab_size=model_vocab_size(tokenizer),
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        sentinel_ids=sentinel_ids(tokenizer),
    )


def _write_quarantine(job: UnitJob, rows: Sequence[BadRow]) -> None:
    with whole_file(job.store / QUARANTINE, scratch=job.progress) as file:
        file.writelines((json.dumps(row._asdict()) + "\n").encode() for row in rows)


def _write_tokenizer(job: UnitJob, tokenizer: PreTrainedTokenizerFast) -> list[Path]:
    """Puts the files of the tokenizer into the store, in place of any that a power cut left torn; returns them."""
    folder, own = job.store / "tokenizer", job.progress / unique_name("tokenizer")
    tokenizer.save_pretrained(own)
    folder.mkdir(exist_ok=True)
    return [file.replace(folder / file.name) for file in sorted(own.iterdir())]


def _check_published(out: Path, settings: dict[str, Any]) -> None:
    """Fails if the store that is there was made with other settings."""
    found = TokenStore.open(out).manifest.get("settings")
    if not isinstance(found, dict):
        raise DataError(f"{out / MANIFEST}: damaged, it holds no settings; make the store again")
    _check_settings(out, found, settings)


def _check_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Fails if a store was made, or begun, with other settings; JSON has no tuples, so both sides go through it."""
    wanted = json.loads(json.dumps(wanted))
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise ConfigError(
            f"out: {folder} was made with another {', '.join(different)}; remove it or choose another folder"
        )


_worker_encoder: TextEncoder
_worker_job: UnitJob
_worker_counters: UnitCounters


def _start_encoder(encoder: TextEncoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode(texts: list[str]) -> list[Tokens]:
    return _worker_encoder(texts)


def _start_unit_writer(job: UnitJob, counters: UnitCounters) -> None:
    global _worker_job, _worker_counters
    _worker_job, _worker_counters = job, counters


def _write_unit(place: int, unit: Unit) -> None:
    for step in write_unit(_worker_job, unit, encode_here(_worker_job.encoder)):
        _worker_counters.add(place, step)

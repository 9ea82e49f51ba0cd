"""Whether all nodes see one run folder: each writes a file there as checkpoints are written, and looks for those of the others."""

import contextlib
import secrets
import time
from pathlib import Path
from typing import Any

from spade_t5.checkpoint.manifest import sync, whole_file
from spade_t5.errors import ConfigError
from spade_t5.launch.doctor.report import gather
from spade_t5.training import distributed, shared_folder


def sharing(run_dir: Path, speakers: dict[int, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Writes a file into the run folder and looks for those of the other nodes (a collective call).

    Args:
        run_dir: the run folder, which the main rank has made.
        speakers: the rank that speaks for each node, and the node's name; the main rank is the first.

    Returns:
        facts of this rank's node, `run_unseen` being the nodes whose file is not seen here: on the main rank any, elsewhere that of the main
        rank. And reasons why nothing was written, as `gather` has them.
    """
    own = distributed.rank()
    token = distributed.gather_objects(secrets.token_hex(8))[0]
    files = {rank: run_dir / f".doctor-{rank:05d}-{token}" for rank in speakers}
    problems: dict[str, str] = {}
    if own in speakers:
        _, problems = gather({"run_folder": lambda: _write(files[own], token)})
    is_written = {rank for rank, failed in enumerate(distributed.gather_objects(problems)) if not failed}
    facts: dict[str, Any] = {}
    if own in speakers and not problems:
        main = min(speakers)
        wanted = {rank: files[rank] for rank in is_written & speakers.keys() if main in (own, rank)}
        facts, problems = gather({"run_folder": lambda: {"run_unseen": _look_for(wanted, token)}})
        facts = {name: [speakers[rank] for rank in ranks] for name, ranks in facts.items()}
    distributed.gather_objects(None)  # nobody's file goes before all have looked
    if own in speakers:
        with contextlib.suppress(OSError):
            files[own].unlink(missing_ok=True)
    return facts, problems


def _write(file: Path, content: str) -> dict[str, Any]:
    try:
        with whole_file(file) as stream:
            stream.write(content.encode())
        sync(file.parent)
    except OSError as error:
        raise ConfigError(f"{file.parent} cannot be written ({error.strerror})") from None
    return {}


def _look_for(files: dict[int, Path], content: str) -> list[int]:
    """The ranks whose files are not there, for all the patience that network file systems need."""
    until = time.monotonic() + shared_folder.PATIENCE_SECONDS
    unseen = dict(files)
    while unseen:
        unseen = {rank: file for rank, file in unseen.items() if not _is_seen(file, content)}
        if time.monotonic() > until:
            break
        if unseen:
            time.sleep(0.1)
    return sorted(unseen)


def _is_seen(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False

"""The folder of a run: who may start in it, what it remembers, and where a resumed run goes on.

A run folder holds config.yaml (resolved), metrics.jsonl, checkpoints/, tensorboard/, plots/, logs/, log.txt and tokenizer/, and while a run goes on
lease.json.
"""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spade_t5.checkpoint import (
    newest_good_checkpoint,
    read_state,
    remove_unfinished,
    set_aside_newer,
    verify_together,
)
from spade_t5.checkpoint.folder import checkpoint_folders, checkpoint_step, restore_replaced
from spade_t5.checkpoint.manifest import FOLDER_MODE, content_hash, whole_file
from spade_t5.checkpoint.state import EVALUATION_IS_DUE, STATE_FILE
from spade_t5.config import ConfigDict, dump_yaml
from spade_t5.errors import ConfigError, DataError, StopRequestedError
from spade_t5.messages import printable, shown
from spade_t5.training import distributed
from spade_t5.training.agreement import on_main, write_on_every_rank, write_on_main
from spade_t5.training.lease import Lease
from spade_t5.training.provenance import check_provenance, provenance
from spade_t5.training.rank_log import RankLog
from spade_t5.training.settings import check_can_be_allowed, check_changes, check_decay, leaves, with_defaults
from spade_t5.training.shared_folder import check_shared, make_folder, remove_empty

logger = logging.getLogger("spade_t5")

CONFIG_FILE = "config.yaml"
RESUME_MODES = "auto, none, or the path of a checkpoint or run folder"


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run goes on, and what may have changed."""

    point: str = "auto"
    """auto: from the newest good checkpoint of the run folder, if it has any; none: anew, in a folder without checkpoints; anything else:
    from the checkpoint of this path, or the newest good one of a run folder."""
    allow_changes: tuple[str, ...] = ()
    """Keys of settings that change what is learned and may differ from the checkpoint's."""
    strict_env: bool = False
    """Refuse other versions of libraries and of this package than the checkpoint was made with."""


AUTO = Resume()


@contextmanager
def open_run_folder(run_dir: Path, resume: Resume) -> Iterator["RunFolder"]:
    """Makes the folder where it is missing, takes its lease and finds the resume point; the lease is given back at the end (a collective call).

    A run that is refused before `RunFolder.begin` leaves the folder as it was.

    Raises:
        ConfigError: another run has the folder, it cannot be written or is not the same for all ranks, or there is nothing to resume or
            something in the way.
        DataError: the checkpoints to resume from are damaged.
        RunAbortedError: the lease was lost.
    """
    _check_equal("run_dir", run_dir)
    made = on_main(lambda: make_folder(run_dir))
    with ExitStack() as stack:
        if distributed.is_main():
            stack.callback(remove_empty, made)
        log = stack.enter_context(RankLog(run_dir / "logs"))
        lease = Lease(run_dir, on_loss=_stop_this_run)
        stack.callback(lease.release)
        on_main(lease.take)
        check_shared(run_dir)
        try:
            yield RunFolder(run_dir, find_resume_point(run_dir, resume.point), resume, lease, log)
        except StopRequestedError:
            if distributed.is_main():
                lease.check()  # a lost lease asks this process to stop, and that is the reason then
            raise


class RunFolder:
    """The folder of a run that this process takes part in; made by `open_run_folder`."""

    def __init__(self, path: Path, resume_from: Path | None, resume: Resume, lease: Lease, log: RankLog) -> None:
        """Takes over what was opened; `resume_from` is a checkpoint that was verified."""
        self.path = path
        self.resume_from = resume_from
        self._state = {} if resume_from is None else read_state(resume_from)
        self.started_from = _started_from(path, resume_from, self._state, resume.point)
        """Where outside of the folder the run was begun; None for one that began at step 0. Every checkpoint says so."""
        self._resume = resume
        self._lease = lease
        self._log = log

    def check_settings(self, resolved: ConfigDict, config_class: type, *, num_steps: int) -> None:
        """Holds the run's settings against those of the other ranks and of the checkpoint it resumes from (a collective call).

        Args:
            resolved: the settings, and what stands for tokenizer and data.
            config_class: dataclass of the settings; its defaults stand for those that an older checkpoint does not know.
            num_steps: length of the run, which epochs may make shorter than `training.steps`.

        Raises:
            ConfigError: ranks were given different settings, or one changed that may not, or so that it does not go with the
                checkpoint's step; on every rank.
        """
        _check_equal("", resolved)
        on_main(lambda: self._check_changes(resolved, config_class, num_steps))

    def is_finished(self, num_steps: int) -> bool:
        """Whether the checkpoint to resume from is the last one of a run of `num_steps` steps."""
        is_last = bool(self._state) and self._state["step"] >= num_steps
        return is_last and not self._state.get(EVALUATION_IS_DUE)

    def begin(self, resolved: ConfigDict) -> None:
        """Writes the first files of the run, whose settings were checked (a collective call).

        Raises:
            ConfigError: they cannot be written.
        """
        self.write(lambda: self._write(resolved))
        write_on_every_rank("run_dir", self.path, self._log.open_file)

    def write(self, action: Callable[[], object]) -> None:
        """Lets the main rank write into the folder (a collective call).

        Raises:
            ConfigError: it cannot be written; on every rank.
        """
        write_on_main("run_dir", self.path, action)

    def check_lease(self) -> dict[str, Any]:
        """What a manifest says of the lease; of use on the main rank, before anything is published.

        Raises:
            RunAbortedError: another run has the folder, or it is gone.
        """
        return self._lease.check()

    def _check_changes(self, resolved: ConfigDict, config_class: type, num_steps: int) -> None:
        if not self._state:
            for name in self._resume.allow_changes:
                check_can_be_allowed(name, set(leaves(resolved)))
        else:
            if not {"config", "provenance"} <= self._state.keys():
                raise ConfigError(
                    f"--resume: {self.resume_from} does not say with which settings it was made; give a checkpoint of spade-t5 pretrain or finetune"
                )
            old = with_defaults(self._state["config"], config_class)
            check_changes(old, resolved, self._resume.allow_changes)
            check_decay(old, resolved, step=self._state["step"], num_steps=num_steps)
            check_provenance(self._state["provenance"], provenance(), is_strict=self._resume.strict_env)

    def _write(self, resolved: ConfigDict) -> None:
        checkpoints = self.path / "checkpoints"
        checkpoints.mkdir(FOLDER_MODE, exist_ok=True)
        remove_unfinished(checkpoints)
        if self._state:
            set_aside_newer(checkpoints, self._state["step"])
        with whole_file(self.path / CONFIG_FILE) as file:
            file.write(dump_yaml(resolved).encode())


def find_resume_point(run_dir: Path, point: str) -> Path | None:
    """The checkpoint to go on from, verified, or None to start anew (a collective call).

    Args:
        run_dir: folder of the run.
        point: see `Resume`.

    Raises:
        ConfigError: nothing is there to resume, or checkpoints would be overwritten.
        DataError: checkpoints are there, but the one asked for, or every one, is damaged.
    """
    own = run_dir / "checkpoints"
    has_own = on_main(lambda: _has_own(own))
    if has_own and _is_restarted():
        point = "auto"  # the first attempt began as it was told to
    if point == "none":
        if has_own:
            raise _already_holds_checkpoints(run_dir)
        return None
    if point == "auto":
        found = newest_good_checkpoint(own)
        if found is None:
            logger.info("no checkpoint in %s: starting at step 0", own)
        return found
    return _resume_point_at(run_dir, Path(point), has_own)


def _has_own(own: Path) -> bool:
    """Whether the run has checkpoints, after one that a kill left without its name has it back; other runs' are not touched."""
    try:
        restore_replaced(own)
        return bool(checkpoint_folders(own))
    except OSError as error:
        raise DataError(f"{own}: cannot be read ({error.strerror}); look at the file system") from None


def _resume_point_at(run_dir: Path, path: Path, has_own: bool) -> Path:
    """A checkpoint, or the newest good one of a run, that was asked for by its path."""
    is_elsewhere = not _is_inside(run_dir, path)
    if has_own and is_elsewhere:
        own = newest_good_checkpoint(run_dir / "checkpoints")
        if own is not None and read_state(own).get("started_from") == str(path.resolve()):
            logger.info("%s was begun from %s: going on from its own checkpoints", run_dir, path)
            return own
    found: Path | None = path
    if on_main(lambda: _looks_like_checkpoint(path)):
        verify_together(path)
    else:
        found = newest_good_checkpoint(path / "checkpoints")
    if found is None:
        raise ConfigError(f"--resume: {printable(path)} is no checkpoint and holds none; give {RESUME_MODES}")
    if has_own and is_elsewhere:
        raise _already_holds_checkpoints(run_dir)
    return found


def _started_from(run_dir: Path, resume_from: Path | None, state: ConfigDict, point: str) -> str | None:
    if resume_from is None:
        return None
    return state.get("started_from") if _is_inside(run_dir, resume_from) else str(Path(point).resolve())


def _is_inside(run_dir: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(run_dir.resolve())


def _already_holds_checkpoints(run_dir: Path) -> ConfigError:
    return ConfigError(
        f"run_dir: {run_dir} already holds checkpoints; use another run_dir, or --resume auto to go on with them"
    )


def _is_restarted() -> bool:
    """Whether `spade-t5 launch` or torchrun has started this group of processes again after a fault."""
    return any(os.environ.get(name, "0") != "0" for name in ("SPADE_T5_ATTEMPT", "TORCHELASTIC_RESTART_COUNT"))


def _looks_like_checkpoint(path: Path) -> bool:
    return path.is_dir() and (checkpoint_step(path) is not None or (path / STATE_FILE).is_file())


def _check_equal(name: str, value: Any) -> None:
    """Fails on every rank unless all have the same value, a path or a config.

    Raises:
        ConfigError: naming the first setting that differs, with both values, where it has a value.
    """
    if len(set(distributed.gather_objects(content_hash({"": _plain(value)})))) == 1:
        return
    first, *others = (leaves(_plain(each), name) for each in distributed.gather_objects(value))
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if json.dumps(first.get(key)) != json.dumps(other.get(key)):  # 1 and 1.0 are equal to Python
                raise ConfigError(
                    f"{key}: {shown(first.get(key))} on rank 0 and {shown(other.get(key))} on rank {rank}; start every rank with the same settings"
                )
    # such as a section without settings on one rank that another rank has not at all
    raise ConfigError(f"{name or 'config'}: not the same on every rank; start every rank with the same settings")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _stop_this_run() -> None:
    # The engine stops at the end of the step and wants to save, which the lost lease forbids: all ranks end with that reason.
    os.kill(os.getpid(), signal.SIGTERM)

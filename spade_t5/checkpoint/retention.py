"""Which checkpoints stay on disk."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spade_t5.checkpoint.folder import checkpoint_folders, checkpoint_step, delete_checkpoint
from spade_t5.checkpoint.manifest import read_manifest
from spade_t5.checkpoint.state import HELD_OUT_LOSS
from spade_t5.errors import DataError

logger = logging.getLogger("spade_t5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints are kept: those that any of the rules names."""

    keep_last: int = 2
    """So many of the newest."""
    keep_every_steps: int | None = None
    """Those of steps that are multiples of this, for good; None: none."""
    keep_best: int = 0
    """So many with the lowest held-out loss, of those whose step was evaluated."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.keep_last < 1:
            raise ValueError(f"keep_last: {self.keep_last} must be at least 1")
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise ValueError(f"keep_every_steps: {self.keep_every_steps} must be at least 1, or None for none")
        if self.keep_best < 0:
            raise ValueError(f"keep_best: {self.keep_best} must not be negative")

    def apply(self, folder: Path, verified: Path) -> list[Path]:
        """Deletes older checkpoints that no rule keeps (main rank only); what cannot be deleted is reported in the log.

        A checkpoint with missing or shortened files does not count as one of the newest or best, so it never displaces a whole one.

        Args:
            folder: the run's `checkpoints` folder.
            verified: a checkpoint whose files were just read back; it stays, and so does all that is newer.

        Returns:
            what was deleted.
        """
        found = [
            _Found(path, step) for path in checkpoint_folders(folder) if (step := checkpoint_step(path)) is not None
        ]
        kept = self._kept(_whole_ones(found))
        newest = checkpoint_step(verified)
        assert newest is not None
        deleted = []
        for path, step in found:
            if step < newest and step not in kept:
                try:
                    delete_checkpoint(path)
                    deleted.append(path)
                except OSError as error:
                    logger.warning("%s: cannot be deleted (%s); free the space by hand", path, error.strerror)
        return deleted

    def _kept(self, losses: dict[int, float | None]) -> set[int]:
        """Steps that stay, of whole checkpoints with their held-out losses.

        >>> sorted(Retention(keep_last=1, keep_every_steps=20, keep_best=1)._kept({10: 2.5, 20: None, 30: 2.1, 40: 2.2, 50: None}))
        [20, 30, 40, 50]
        """
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every_steps is not None:
            kept |= {step for step in steps if step % self.keep_every_steps == 0}
        best = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        return kept | {step for _, step in best[: self.keep_best]}


class _Found(NamedTuple):
    path: Path
    step: int


def _whole_ones(found: list[_Found]) -> dict[int, float | None]:
    """Steps of the checkpoints whose files have their sizes, with the held-out loss where there is one; nothing is hashed."""
    losses = {}
    for path, step in found:
        try:
            manifest = read_manifest(path)
            is_whole = all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        except (DataError, OSError):
            continue
        if is_whole:
            loss = manifest.get(HELD_OUT_LOSS)
            losses[step] = loss if isinstance(loss, float) else None
    return losses

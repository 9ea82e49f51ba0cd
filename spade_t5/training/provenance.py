"""What made a checkpoint: versions of the libraries that compute, and of this package."""

import logging
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spade_t5.errors import ConfigError

logger = logging.getLogger("spade_t5")

LIBRARIES = ("torch", "deepspeed", "transformers", "triton", "safetensors", "numpy")


def provenance() -> dict[str, str | None]:
    """Name to version; None for a library that is not installed, and for the git revision of a package that is no checkout."""
    return {
        "spade-t5": _version("spade-t5"),
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "git_revision": git_revision(Path(__file__).resolve()),
    }


def check_provenance(old: Mapping[str, Any], new: Mapping[str, Any], *, is_strict: bool) -> None:
    """Compares what made a checkpoint with what goes on from it; differences are announced in the log.

    What the checkpoint says nothing of, because another version of this package made it, is no difference.

    Raises:
        ConfigError: there are some, and `is_strict`.
    """
    changes = [
        f"{name}: {old[name]} made the checkpoint, here is {new[name]}"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]
    if changes and is_strict:
        raise ConfigError(
            f"--strict-env: {'; '.join(changes)}; install what the checkpoint was made with, or leave --strict-env out"
        )
    for change in changes:
        logger.info("%s", change)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def git_revision(file: Path) -> str | None:
    """Commit of the checkout that a file belongs to; None for one that merely lies in a foreign checkout, as in a virtual environment there."""
    try:
        _git("ls-files", "--error-unmatch", file.name, folder=file.parent)
        return _git("rev-parse", "HEAD", folder=file.parent)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str, folder: Path) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

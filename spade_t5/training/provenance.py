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
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "git_revision": _git_revision(),
    }


def check_provenance(old: Mapping[str, Any], new: Mapping[str, Any], *, is_strict: bool) -> None:
    """Compares what made a checkpoint with what goes on from it; differences are announced in the log.

    Raises:
        ConfigError: there are some, and `is_strict`.
    """
    changes = [
        f"{name}: {old.get(name)} made the checkpoint, here is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
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


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

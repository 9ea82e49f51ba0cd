"""The development data: real corpora read in place, never part of the package."""

import os
from pathlib import Path

import pytest


def find_dev_data() -> Path | None:
    """Folder named by SPADE_T5_DEV_DATA; None where it is not set."""
    folder = os.environ.get("SPADE_T5_DEV_DATA")
    return Path(folder) if folder else None


def dev_data() -> Path:
    """Folder named by SPADE_T5_DEV_DATA; the calling test is skipped with a reason when it is not there."""
    folder = os.environ.get("SPADE_T5_DEV_DATA")
    if not folder:
        pytest.skip("SPADE_T5_DEV_DATA is not set: the development data is not on this machine")
    if not Path(folder).is_dir():
        pytest.fail(f"SPADE_T5_DEV_DATA names {folder}, which is not a folder")
    return Path(folder)

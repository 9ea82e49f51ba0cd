"""Checkpoints that load at any world size, and folders that verify themselves."""

from spade_t5.checkpoint.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights_into,
    read_state,
    read_weights,
    save_checkpoint,
    verify_checkpoint,
    verify_together,
)
from spade_t5.checkpoint.manifest import publish, verify_folder, write_manifest

__all__ = [
    "checkpoint_path",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights_into",
    "publish",
    "read_state",
    "read_weights",
    "save_checkpoint",
    "verify_checkpoint",
    "verify_folder",
    "verify_together",
    "write_manifest",
]

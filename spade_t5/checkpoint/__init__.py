"""Checkpoints that are written behind the training, load at any world size, and verify themselves.

A checkpoint folder holds

    rank-00000.safetensors ...   1-D pieces of weights (fp32), optimizer moments and averages that the rank owned, named "<state>/<parameter>"
    frozen.safetensors           parameters that do not train, and persistent buffers, whole
    state.json                   step, counters, the resolved config, and the index: state -> parameter -> [[file, offset, numel], ...];
                                 optimizer states of another shape than the parameter (Adafactor's factors) are listed as whole
    manifest.json                size and sha256 of every file, and its own

Nothing is pickled, and no tensor is gathered. Random-generator states are not saved: generators are seeded from (seed, step, micro-batch,
rank). docs/checkpoints.md says what a user can rely on.
"""

from spade_t5.checkpoint.folder import (
    check_free_space,
    checkpoint_folders,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    remove_unfinished,
    set_aside_newer,
)
from spade_t5.checkpoint.loading import load_checkpoint, load_weights_into, read_weights
from spade_t5.checkpoint.manifest import publish, verify_folder, write_manifest
from spade_t5.checkpoint.retention import Retention
from spade_t5.checkpoint.saver import CheckpointSaver, SaveReport, save_checkpoint
from spade_t5.checkpoint.size import checkpoint_bytes
from spade_t5.checkpoint.snapshot import Snapshot, take_snapshot
from spade_t5.checkpoint.state import read_state
from spade_t5.checkpoint.verifying import newest_good_checkpoint, verify_checkpoint, verify_together

__all__ = [
    "CheckpointSaver",
    "Retention",
    "SaveReport",
    "Snapshot",
    "check_free_space",
    "checkpoint_bytes",
    "checkpoint_folders",
    "checkpoint_path",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights_into",
    "newest_good_checkpoint",
    "publish",
    "read_state",
    "read_weights",
    "remove_unfinished",
    "save_checkpoint",
    "set_aside_newer",
    "take_snapshot",
    "verify_checkpoint",
    "verify_folder",
    "verify_together",
    "write_manifest",
]

"""Training checkpoints: safetensors and JSON, loadable at any world size and ZeRO stage.

A checkpoint folder holds

    rank-00000.safetensors ...   1-D pieces of weights (fp32) and optimizer moments that the rank owned, named "<state>/<parameter>"
    frozen.safetensors           parameters that do not train, and persistent buffers, whole
    state.json                   step, counters, the resolved config, and the index: state -> parameter -> [[file, offset, numel], ...];
                                 optimizer states of another shape than the parameter (Adafactor's factors) are listed as whole
    manifest.json                size and sha256 of every file

Saving copies only what a rank owns and gathers no tensor; loading reads only the slices that a rank needs, plus the whole weights for the
module itself. Nothing is pickled. Random-generator states are not saved: generators are seeded from (seed, step, micro-batch, rank).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spade_t5.checkpoint.manifest import (
    MANIFEST,
    check_file,
    file_entry,
    publish,
    read_manifest,
    verify_folder,
    write_manifest,
)
from spade_t5.errors import DataError
from spade_t5.training import distributed
from spade_t5.training.backend import Backend, unique_state
from spade_t5.training.optimizers import Fragment

FORMAT_VERSION = 1
WEIGHT = "weight"
FROZEN_FILE = "frozen.safetensors"
STATE_FILE = "state.json"

Index = dict[str, dict[str, list[tuple[str, int, int]]]]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first; hidden folders of unfinished saves are not among them."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).exists())


def latest_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The newest checkpoint whose manifest can be read, or that of `step`; None if there is none."""
    for path in reversed(list_checkpoints(folder)):
        if step is not None and path != checkpoint_path(folder, step):
            continue
        try:
            read_manifest(path)
        except DataError:
            continue
        return path
    return None


def save_checkpoint(folder: Path, backend: Backend, *, step: int, facts: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step` (a collective call) and removes the oldest ones beyond `keep`.

    Args:
        folder: the run's `checkpoints` folder, visible to all ranks.
        backend: owner of the weights and of the optimizer.
        step: number of finished steps.
        facts: further JSON values for `state.json`.
        keep: number of newest checkpoints that stay.

    Returns:
        the published folder.
    """
    final = checkpoint_path(folder, step)
    temporary = folder / f".{final.name}.tmp"
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    written = _write_own_files(temporary, backend)
    parts: list[Any] = distributed.gather_objects(written)
    if distributed.is_main():
        _finish(temporary, parts, step, facts)
        if final.exists():
            shutil.rmtree(final)
        publish(temporary, final)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def load_checkpoint(path: Path, backend: Backend) -> dict[str, Any]:
    """Verifies a checkpoint and puts it into `backend` (a collective call).

    Returns:
        the content of `state.json`.

    Raises:
        DataError: the checkpoint is damaged, or does not fit the model.
    """
    verify_together(path)
    state = read_state(path)
    index: Index = state["index"]
    names = {name for name, p in backend.module.named_parameters() if p.requires_grad}
    if names != set(index[WEIGHT]):
        odd = sorted(names.symmetric_difference(index[WEIGHT]))[0]
        raise DataError(
            f"{path}: its trained parameters are not the model's (such as {odd}); use the configuration it was trained with"
        )
    reader = _SliceReader(path)
    for fragment in backend.fragments():
        _load_fragment(fragment, backend.optimizer, state, reader)
    backend.load_weights(read_weights(path))
    return state


def read_state(path: Path) -> dict[str, Any]:
    """Content of a checkpoint's `state.json`.

    Raises:
        DataError: it cannot be read, or was written in another format.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path / STATE_FILE}: missing or unreadable; use another checkpoint") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: format {state.get('format_version')}, this version reads {FORMAT_VERSION}")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole and fp32, tied ones under their first name."""
    state = read_state(path)
    reader = _SliceReader(path)
    weights = load_file(path / FROZEN_FILE)
    for name, pieces in state["index"][WEIGHT].items():
        whole = torch.empty(sum(numel for _, _, numel in pieces))
        for file, offset, numel in pieces:
            whole[offset : offset + numel] = reader.read(file, f"{WEIGHT}/{name}", 0, numel)
        weights[name] = whole.view(state["shapes"][name])
    return weights


@torch.no_grad()
def load_weights_into(module: nn.Module, path: Path) -> None:
    """Verifies a checkpoint and copies its weights into a bare module, by name.

    A module with a subset of the parameters takes those; parameters that the checkpoint lacks (a fresh head) keep their values.

    Raises:
        DataError: the checkpoint is damaged, has none of the module's parameters, or one of another shape.
    """
    verify_checkpoint(path)
    weights = read_weights(path)
    taken = 0
    for name, tensor in unique_state(module):
        if name in weights:
            if weights[name].shape != tensor.shape:
                raise DataError(
                    f"{path}: {name} has shape {tuple(weights[name].shape)}, the model needs {tuple(tensor.shape)}"
                )
            tensor.copy_(weights[name])
            taken += 1
    if not taken:
        raise DataError(f"{path}: has none of the model's parameters; it was made by another kind of model")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
        DataError: a file is missing or damaged.
    """
    return verify_folder(path)


def verify_together(path: Path) -> None:
    """As `verify_checkpoint`, a collective call: each rank hashes some of the files.

    Raises:
        DataError: a file is missing or damaged; on all ranks.
    """
    problem = None
    try:
        files = list(read_manifest(path)["files"].items())
        for name, entry in files[distributed.rank() :: distributed.world_size()]:
            check_file(path, name, entry)
    except DataError as error:
        problem = str(error)
    problems = [found for found in distributed.gather_objects(problem) if found is not None]
    if problems:
        raise DataError(str(problems[0]))


class _SliceReader:
    """Reads tensors and slices of them from the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file]

    def read(self, file: str, key: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of a 1-D tensor."""
        return self._open(file).get_slice(key)[start:stop]

    def read_whole(self, file: str, key: str) -> Tensor:
        """A tensor of any shape."""
        return self._open(file).get_tensor(key)


def _write_own_files(folder: Path, backend: Backend) -> dict[str, Any]:
    """Writes this rank's files; returns their manifest entries and what they hold."""
    tensors: dict[str, Tensor] = {}
    index: Index = {}
    whole: dict[str, dict[str, str]] = {}
    scalars: dict[str, dict[str, float]] = {}
    entries: dict[str, dict[str, Any]] = {}
    file = f"rank-{distributed.rank():05d}.safetensors"
    for fragment in backend.fragments() if backend.is_sharded or distributed.is_main() else []:
        states = {WEIGHT: fragment.flat, **backend.optimizer.state.get(fragment.flat, {})}
        for key, value in states.items():
            if value.dim() == 0:
                scalars.setdefault(key, {})[fragment.name] = float(value)
                continue
            if value.shape == fragment.flat.shape:
                value = value.detach().reshape(-1)[fragment.start : fragment.start + fragment.numel]
                index.setdefault(key, {})[fragment.name] = [(file, fragment.offset, fragment.numel)]
            else:
                whole.setdefault(key, {})[fragment.name] = file
            tensors[f"{key}/{fragment.name}"] = value.detach().to("cpu", copy=True).contiguous()
    if tensors:
        save_file(tensors, folder / file)
        entries[file] = file_entry(folder / file)
    if distributed.is_main():
        save_file(backend.frozen_state(), folder / FROZEN_FILE)
        entries[FROZEN_FILE] = file_entry(folder / FROZEN_FILE)
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in backend.module.named_parameters()}
    return {"entries": entries, "index": index, "whole": whole, "scalars": scalars, "shapes": shapes}


def _finish(folder: Path, parts: list[Any], step: int, facts: dict[str, Any]) -> None:
    """Joins what the ranks wrote into `state.json` and writes the manifest."""
    index: Index = {}
    scalars: dict[str, dict[str, float]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for part in parts:
        entries |= part["entries"]
        for key, names in part["index"].items():
            for name, pieces in names.items():
                index.setdefault(key, {}).setdefault(name, []).extend(pieces)
        for key, values in part["scalars"].items():
            scalars.setdefault(key, {}).update(values)
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        **facts,
        "shapes": parts[0]["shapes"],
        "scalars": scalars,
        "whole": parts[0]["whole"],
        "index": index,
    }
    (folder / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")
    entries[STATE_FILE] = file_entry(folder / STATE_FILE)
    write_manifest(folder, entries, kind="checkpoint", step=step)


def _load_fragment(
    fragment: Fragment, optimizer: torch.optim.Optimizer, state: dict[str, Any], reader: _SliceReader
) -> None:
    """Fills the fragment's place in the optimizer's tensors, making those that a fresh optimizer does not have yet."""
    values = optimizer.state[fragment.flat]
    for key, names in state["index"].items():
        if fragment.name not in names:
            continue
        if key != WEIGHT and key not in values:
            values[key] = torch.zeros_like(fragment.flat)
        target = fragment.flat if key == WEIGHT else values[key]
        _copy_pieces(target.detach().view(-1), fragment, names[fragment.name], f"{key}/{fragment.name}", reader)
    for key, files in state["whole"].items():
        if fragment.name in files:
            values[key] = reader.read_whole(files[fragment.name], f"{key}/{fragment.name}").to(fragment.flat.device)
    for key, numbers in state["scalars"].items():
        if fragment.name in numbers:
            values[key] = torch.tensor(numbers[fragment.name])


def _copy_pieces(
    target: Tensor, fragment: Fragment, pieces: list[tuple[str, int, int]], key: str, reader: _SliceReader
) -> None:
    """Copies what the stored pieces and the fragment have in common."""
    for file, offset, numel in pieces:
        start = max(offset, fragment.offset)
        stop = min(offset + numel, fragment.offset + fragment.numel)
        if start < stop:
            at = fragment.start + start - fragment.offset
            target[at : at + stop - start] = reader.read(file, key, start - offset, stop - offset).to(target.device)

"""Reads checkpoints at any world size and ZeRO stage, whatever they were written at.

Each rank reads only the slices of weights, optimizer state and averages that it needs, plus the whole weights for the module itself.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spade_t5.checkpoint.state import AVERAGE, FROZEN_FILE, WEIGHT, Piece, read_state
from spade_t5.checkpoint.tensor_file import TensorFile
from spade_t5.checkpoint.verifying import verify_checkpoint, verify_together
from spade_t5.errors import DataError
from spade_t5.training.agreement import on_every_rank
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.backend import Backend, unique_state
from spade_t5.training.optimizers import Fragment

logger = logging.getLogger("spade_t5")


def load_checkpoint(
    path: Path, backend: Backend, *, average: WeightAverage | None = None, is_verified: bool = False
) -> dict[str, Any]:
    """Puts a checkpoint into `backend` (a collective call).

    Args:
        path: the checkpoint.
        backend: owner of the weights and of the optimizer; at any world size and ZeRO stage.
        average: takes the moving average of the weights; the weights themselves where the checkpoint has none.
        is_verified: the caller has just verified it, as `newest_good_checkpoint` does.

    Returns:
        the content of `state.json`; asking it for a key that it does not have is a DataError.

    Raises:
        DataError: the checkpoint is damaged, or does not fit the model.
    """
    if not is_verified:
        verify_together(path)
    state, weights = on_every_rank(lambda: _read_fitting(path, backend))
    on_every_rank(lambda: _load_fragments(path, backend, state, average))
    backend.load_weights(weights)
    return state


def read_weights(path: Path, *, is_averaged: bool = False) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole and fp32, tied ones under their first name.

    Args:
        path: the checkpoint.
        is_averaged: take the moving averages of the weights that train.

    Raises:
        DataError: the checkpoint is damaged, or holds no averages.
    """
    state = read_state(path)
    key = AVERAGE if is_averaged else WEIGHT
    if key not in state["index"]:
        raise DataError(f"{path}: holds no averages of the weights; the run needs training.ema_decay for them")
    reader = _Reader(path)
    weights = reader.all_of(FROZEN_FILE)
    for name, pieces in state["index"][key].items():
        parts = [reader.piece(piece, f"{key}/{name}", 0, piece.numel) for piece in pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0)])
        weights[name] = whole.view(state["shapes"][name])
    return weights


@torch.no_grad()
def load_weights_into(module: nn.Module, path: Path, *, is_averaged: bool = False) -> None:
    """Verifies a checkpoint and copies its weights into a bare module, by name.

    A module with a subset of the parameters takes those; parameters that the checkpoint lacks (a fresh head) keep their values.

    Args:
        module: takes the weights.
        path: the checkpoint.
        is_averaged: take the moving averages of the weights that train.

    Raises:
        DataError: the checkpoint is damaged, has none of the module's parameters, or one of another shape.
    """
    verify_checkpoint(path)
    weights = read_weights(path, is_averaged=is_averaged)
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


class _Reader:
    """Reads tensors and slices of them from the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, TensorFile] = {}

    def file(self, name: str) -> TensorFile:
        """A file of the folder."""
        if name not in self._files:
            self._files[name] = TensorFile(self._folder / name)
        return self._files[name]

    def all_of(self, file: str) -> dict[str, Tensor]:
        """Every tensor of a file."""
        return {name: self.file(file).read(name) for name in self.file(file).names()}

    def piece(self, piece: Piece, key: str, start: int, stop: int) -> Tensor:
        """Elements start:stop of a piece of a parameter, which must be as long as the index says."""
        file = self.file(piece.file)
        if file.numel(key) != piece.numel:
            raise DataError(
                f"{self._folder / piece.file}: {key} has {file.numel(key)} elements, the index says {piece.numel}; use another checkpoint"
            )
        return file.read(key, start, stop)


def _read_fitting(path: Path, backend: Backend) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state and the whole weights, if they are those of the backend's model."""
    state, weights = read_state(path), read_weights(path)
    remedy = "use the configuration it was trained with"
    trained = {name for name, p in backend.module.named_parameters() if p.requires_grad}
    if trained != state["index"][WEIGHT].keys():
        odd = sorted(trained ^ state["index"][WEIGHT].keys())[0]
        raise DataError(f"{path}: its trained parameters are not the model's (such as {odd}); {remedy}")
    for name, tensor in unique_state(backend.module):
        shape = getattr(tensor, "ds_shape", tensor.shape)
        if name not in weights:
            raise DataError(f"{path}: lacks {name}; {remedy}")
        if weights[name].shape != shape:
            raise DataError(
                f"{path}: {name} has shape {tuple(weights[name].shape)}, the model needs {tuple(shape)}; {remedy}"
            )
    return state, weights


def _load_fragments(path: Path, backend: Backend, state: dict[str, Any], average: WeightAverage | None) -> None:
    """Fills the optimizer's tensors and the averages of this rank."""
    reader = _Reader(path)
    for fragment in backend.fragments():
        _load_fragment(fragment, backend.optimizer, state, reader)
        if average is not None:
            key = AVERAGE if AVERAGE in state["index"] else WEIGHT
            pieces = state["index"][key].get(fragment.name, [])
            _copy_pieces(average.flat(fragment), fragment, pieces, f"{key}/{fragment.name}", reader)
    if average is not None and AVERAGE not in state["index"]:
        logger.info("%s holds no average of the weights: it starts from the weights", path)


def _load_fragment(
    fragment: Fragment, optimizer: torch.optim.Optimizer, state: dict[str, Any], reader: _Reader
) -> None:
    """Fills the fragment's place in the optimizer's tensors, making those that a fresh optimizer does not have yet."""
    values = optimizer.state[fragment.flat]
    for key, names in state["index"].items():
        if key == AVERAGE or fragment.name not in names:
            continue
        if key != WEIGHT and key not in values:
            values[key] = torch.zeros_like(fragment.flat)
        target = fragment.flat if key == WEIGHT else values[key]
        _copy_pieces(target, fragment, names[fragment.name], f"{key}/{fragment.name}", reader)
    for key, files in state["whole"].items():
        if fragment.name in files:
            whole = reader.file(files[fragment.name]).read(f"{key}/{fragment.name}")
            values[key] = whole.to(fragment.flat.device)
    for key, numbers in state["scalars"].items():
        if fragment.name in numbers:
            values[key] = torch.tensor(float(numbers[fragment.name]))


def _copy_pieces(target: Tensor, fragment: Fragment, pieces: list[Piece], key: str, reader: _Reader) -> None:
    """Copies what the stored pieces and the fragment have in common."""
    flat = target.detach().view(-1)
    for piece in pieces:
        start = max(piece.offset, fragment.offset)
        stop = min(piece.offset + piece.numel, fragment.offset + fragment.numel)
        if start < stop:
            at = fragment.start + start - fragment.offset
            flat[at : at + stop - start] = reader.piece(piece, key, start - piece.offset, stop - piece.offset).to(
                flat.device
            )

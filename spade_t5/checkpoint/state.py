"""`state.json`: step, counters, the resolved config, and the index that says where every tensor lies.

It is read from disk and therefore not trusted: names must be plain, the pieces of a parameter must cover it exactly, and numbers must be
numbers, before any of it is used.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from spade_t5.checkpoint.manifest import is_plain_name, read_small
from spade_t5.errors import DataError
from spade_t5.messages import shown

FORMAT_VERSION = 1
STATE_FILE = "state.json"
FROZEN_FILE = "frozen.safetensors"
WEIGHT = "weight"
"""Key of the weights in the index; the others are the optimizer's own."""
AVERAGE = "ema"
"""Key of the moving averages of the weights in the index, where the run keeps them."""
HELD_OUT_LOSS = "held_out_loss"
"""The fact that says how good a checkpoint is, where its step was evaluated; the manifest has it too."""
EVALUATION_IS_DUE = "evaluation_is_due"
"""The fact that a run was stopped before the evaluation of this step."""
FACT_TYPES: dict[str, type | tuple[type, ...]] = {
    "tokens": int,
    "cursor": dict,
    "skipped_steps": list,
    "losses": list,
    EVALUATION_IS_DUE: bool,
    "config": dict,
    "model_config": dict,
    "model_class": str,
    "provenance": dict,
    HELD_OUT_LOSS: (int, float),
}
"""What facts must be where they are there."""


class Piece(NamedTuple):
    """A run of elements of a flattened parameter."""

    file: str
    offset: int
    numel: int


class State(dict[str, Any]):
    """Content of `state.json`; asking for a key that it does not have is a `DataError` that says so."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        """Takes the content of the file at `path`."""
        super().__init__(content)
        self._path = path

    def __missing__(self, key: str) -> NoReturn:
        """Names the file and the key."""
        raise DataError(
            f"{self._path}: does not hold {key!r}, it was written by another version; use that version, or another checkpoint"
        )


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def read_state(path: Path) -> dict[str, Any]:
    """Content of a checkpoint's `state.json`; the index holds `Piece`s, in the order of their offsets.

    Raises:
        DataError: it cannot be read, contradicts itself, or was written in another format.
    """
    file = path / STATE_FILE
    try:
        content = json.loads(read_small(file))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{file}: missing or unreadable; use another checkpoint") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: is no JSON object; use another checkpoint")
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{file}: format {shown(content.get('format_version'))}, this version reads {FORMAT_VERSION}")
    state = State(file, content)
    try:
        _check_facts(state)
        state["index"] = {key: _pieces(names, state["shapes"]) for key, names in _items(state["index"])}
        _check_other_states(state)
        if WEIGHT not in state["index"]:
            raise ValueError("index: has no weights")
    except ValueError as error:
        raise DataError(f"{file}: {error}; use another checkpoint") from None
    return state


def files_of(state: Mapping[str, Any]) -> set[str]:
    """Every file that a checkpoint's tensors lie in."""
    pieces = (piece for names in state["index"].values() for found in names.values() for piece in found)
    return {piece.file for piece in pieces} | {file for files in state["whole"].values() for file in files.values()}


def tensors_of(state: Mapping[str, Any], file: str) -> dict[str, int | None]:
    """Names of the tensors that the state says are in a file, with the number of their elements where it says that too."""
    tensors: dict[str, int | None] = {}
    for key, names in state["index"].items():
        for name, pieces in names.items():
            tensors |= {f"{key}/{name}": piece.numel for piece in pieces if piece.file == file}
    for key, files in state["whole"].items():
        tensors |= {f"{key}/{name}": None for name, found in files.items() if found == file}
    return tensors


def _items(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} stands where a mapping belongs")
    return value.items()


def _check_facts(state: State) -> None:
    if not _is_count(state["step"]):
        raise ValueError(f"step: {shown(state['step'])} is no number of steps")
    for name, types in FACT_TYPES.items():
        value = state.get(name)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool) != (types is bool)):
            raise ValueError(f"{name}: {shown(value)} is of the wrong type")
    for name, shape in _items(state["shapes"]):
        if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
            raise ValueError(f"shapes: {shown(name)} has {shown(shape)}")


def _pieces(names: Any, shapes: dict[str, list[int]]) -> dict[str, list[Piece]]:
    """Pieces of every parameter in order; together they must be the parameter, and no file may hold two of them."""
    result = {}
    for name, found in _items(names):
        if name not in shapes:
            raise ValueError(f"index: {shown(name)} has no shape")
        if not isinstance(found, list):
            raise ValueError(f"index: {shown(name)} has {shown(found)}")
        pieces = sorted((_piece(name, piece) for piece in found), key=lambda piece: piece.offset)
        place = 0
        for piece in pieces:
            if piece.offset != place:
                raise ValueError(f"index: {shown(name)} has a piece at {piece.offset}, expected {place}")
            place += piece.numel
        if place != math.prod(shapes[name]):
            raise ValueError(f"index: {shown(name)} has {place} elements, its shape {shapes[name]}")
        if len({piece.file for piece in pieces}) != len(pieces):
            raise ValueError(f"index: {shown(name)} has two pieces in one file")
        result[name] = pieces
    return result


def _piece(name: str, piece: Any) -> Piece:
    if not isinstance(piece, list) or len(piece) != 3:
        raise ValueError(f"index: {shown(name)} has {shown(piece)}")
    file, offset, numel = piece
    if not isinstance(file, str) or not is_plain_name(file):
        raise ValueError(f"index: {shown(name)} lies in {shown(file)}, which is not a plain file name; refused")
    if not _is_count(offset) or not _is_count(numel):
        raise ValueError(f"index: {shown(name)} has {shown(piece)}")
    return Piece(file, offset, numel)


def _check_other_states(state: State) -> None:
    for key, names in _items(state["whole"]):
        for name, file in _items(names):
            if not isinstance(file, str) or not is_plain_name(file):
                raise ValueError(
                    f"whole: {shown(key)}/{shown(name)} lies in {shown(file)}, which is not a plain file name; refused"
                )
    for key, names in _items(state["scalars"]):
        for name, number in _items(names):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < float("inf"):
                raise ValueError(f"scalars: {shown(key)}/{shown(name)} is {shown(number)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62

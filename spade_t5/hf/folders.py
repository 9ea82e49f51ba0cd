"""A folder in Hugging Face's layout, looked at before anything in it is used.

Weights are read from safetensors alone and settings from JSON. Nothing in a folder is run, whatever its files ask for, and nothing outside it
is read through it. What is named on the hub is fetched first, and no other file than those that are read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spade_t5.checkpoint.manifest import is_plain_name
from spade_t5.checkpoint.tensor_file import TensorFile
from spade_t5.errors import ConfigError, DataError, UserError
from spade_t5.messages import reason_of, shown
from spade_t5.training.backend import unique_state

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_FILES = (CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors")
"""Files that a model is read from, as patterns."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
"""Files that a tokenizer is read from."""

CODE_KEYS = (
    "auto_map",
    "custom_generate",
    "_attn_implementation_internal",
    "_attn_implementation",
    "quantization_config",
)
"""Settings by which a folder asks for code that is not in it, or not of the installed libraries."""

_MAX_JSON_BYTES = 2**24
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<revision>[\w][\w./-]*))?")


def local_folder(path_or_name: str | Path, *, files: Sequence[str]) -> Path:
    """The folder itself, or what a name on the hub stands for, fetched into the hub's cache.

    Args:
        path_or_name: a folder, or a name such as `google-t5/t5-small`, with `@` and a commit, branch or tag behind it if wanted.
        files: patterns of the files that are fetched from the hub; no others are.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_name)
    name = _HUB_NAME.fullmatch(text)
    # A path that was mistyped is nobody else's business: what may be meant to lie here is not asked for on the hub.
    if name is None or path.exists() or ("/" in text and Path(text.partition("/")[0]).is_dir()):
        raise ConfigError(f"{text}: no such folder; give a run folder, an exported model, or a name on the hub")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name["name"], revision=name["revision"], allow_patterns=list(files))
        )
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ConfigError(f"{text}: no such folder, and it cannot be had from the hub: {reason}") from None


def plain_file(folder: Path, name: str) -> Path:
    """The file of a folder that has this name, links followed; the hub's cache makes links, to its own files.

    Raises:
        DataError: it is missing, no plain file, or leads out of the folder.
    """
    path = folder / name
    if not is_plain_name(name):
        raise DataError(f"{folder}: names the file {shown(name)}, which is no name of a file in it; refused")
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):
        raise DataError(f"{path}: a link that leads nowhere; use another model") from None
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if real.parent not in (root, blobs):
        raise DataError(f"{path}: a link that leads out of its folder; refused, put the file itself there")
    if not real.is_file():
        raise DataError(f"{path}: missing or not a plain file; the folder is not complete, use another model")
    return real


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The mapping in a JSON file of a folder.

    Raises:
        DataError: it cannot be read, or asks for code.
    """
    try:
        with plain_file(folder, name).open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error, max_bytes=200)
        raise DataError(f"{folder / name}: not readable as JSON ({reason}); use another model") from None
    if not isinstance(content, dict):
        raise DataError(f"{folder / name}: holds a {type(content).__name__}, expected an object; use another model")
    for key in CODE_KEYS:
        if content.get(key) is not None:
            raise DataError(
                f"{folder / name}: {key} asks for code from elsewhere, which is never run; "
                "remove the key if the model works without it, or use another model"
            )
    return content


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds each of its tensors; every file has been found to be what it says.

    Raises:
        DataError: there are no safetensors, one of them is damaged or missing, or the index lists others than there are.
    """
    index: Mapping[str, Any] | None = None
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / WEIGHTS_INDEX).exists():
            raise _no_weights(folder)
        index = read_settings(folder, WEIGHTS_INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise DataError(f"{folder / WEIGHTS_INDEX}: weight_map does not say which file holds which tensor")
        files = sorted(set(index.values()))
    found: dict[str, Path] = {}
    listed: dict[str, str] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise DataError(
                f"{folder / WEIGHTS_INDEX}: names {shown(file)}; only .safetensors are read, since others can run code"
            )
        path = plain_file(folder, file)
        with TensorFile(path) as tensors:
            for name in tensors.names():
                if name in found:
                    raise DataError(f"{folder / file}: holds {shown(name)}, as does another file; use another model")
                found[name], listed[name] = path, file
    if index is not None and index != listed:
        odd = sorted(str(name) for name in index.keys() | listed.keys() if index.get(name) != listed.get(name))
        raise DataError(f"{folder / WEIGHTS_INDEX}: {shown(odd[0])} is not where it says; use another model")
    return found


class FolderWeights:
    """The tensors of a folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Looks at every file of weights.

        Raises:
            DataError: as `weight_files`.
        """
        self._folder = folder
        self._files = weight_files(folder)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            DataError: there is none of this name.
        """
        if name not in self._files:
            raise DataError(f"{self._folder}: lacks {name}; the model is not complete, use another one")
        with TensorFile(self._files[name]) as tensors:
            return tensors.read(name)


@torch.no_grad()
def load_folder_weights(
    module: nn.Module, folder: Path, *, may_lack: tuple[str, ...] = (), may_hold: Iterable[str] = ()
) -> None:
    """Copies the weights in a folder into a module, by name.

    Args:
        module: what they are for, tied weights tied.
        folder: where they are.
        may_lack: beginnings of names whose tensors keep their values if the folder has none for them.
        may_hold: patterns of names that the folder may hold and the module lacks.

    Raises:
        DataError: a tensor is missing, is no part of the module, or is of another shape or kind.
    """
    weights = FolderWeights(folder)
    known, patterns = module.state_dict(keep_vars=True).keys(), tuple(may_hold)
    for name in weights:
        if name not in known and not any(re.search(pattern, name) for pattern in patterns):
            raise DataError(f"{folder}: holds {shown(name)}, which is no part of {type(module).__name__}")
    for name, tensor in unique_state(module):
        if name not in weights and name.startswith(may_lack):
            continue
        value = weights[name]
        if value.shape != tensor.shape or value.is_floating_point() != tensor.is_floating_point():
            raise DataError(
                f"{folder}: {name} is {value.dtype} of shape {tuple(value.shape)}, the model needs {tensor.dtype} of {tuple(tensor.shape)}"
            )
        tensor.copy_(value)


@contextmanager
def read_by_library(origin: str | Path, what: str) -> Iterator[None]:
    """Turns whatever a library raises over a file from outside into one line; Rust's panics are not even `Exception`s.

    Raises:
        ConfigError: naming the file and the reason.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = reason_of(error)
        raise ConfigError(f"{what}: {origin} cannot be read: {type(error).__name__}: {reason}") from None


def _no_weights(folder: Path) -> DataError:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED and path.stem != "training_args")
    if not pickled:
        return DataError(f"{folder}: holds neither {WEIGHTS} nor {WEIGHTS_INDEX}; the model is not complete")
    return DataError(
        f"{folder}: {pickled[0]} is not read, since such a file can run code; have it converted to safetensors first "
        "(many models of the hub have such a version in a pull request: NAME@refs/pr/NUMBER)"
    )

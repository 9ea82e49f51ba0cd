"""One way to name a model: an exported folder, a run folder, a checkpoint of a run, or a name on the hub."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from spade_t5.checkpoint import latest_checkpoint, load_weights_into, read_state
from spade_t5.configuration import SpadeT5Config
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.tokenizer import load_tokenizer
from spade_t5.modeling import SpadeT5PreTrainedModel

Model = TypeVar("Model", bound=SpadeT5PreTrainedModel)


def build_model(cls: type[Model], config: SpadeT5Config, *, seed: int) -> Model:
    """A freshly initialised model, the same on every rank."""
    torch.manual_seed(seed)
    return cls(config)


def find_checkpoint(path: Path, step: int | None = None) -> Path | None:
    """The checkpoint that `path` means: itself, or in a run folder that of `step`, the newest by default; None if it is neither.

    Raises:
        DataError: the run folder has no such checkpoint.
    """
    if (path / "state.json").is_file():
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        return None
    found = latest_checkpoint(folder, step)
    if found is None:
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise DataError(f"{path}: the run folder does not hold {wanted}")
    return found


def resolve_model_config(model: dict[str, Any], vocab_size: int) -> SpadeT5Config:
    """The model that a config's `model` section describes, with the tokenizer's vocabulary unless it sets its own.

    Raises:
        ConfigError: neither `preset` nor `init_from` is given, or both, or a field is wrong.
    """
    values = dict(model)
    preset, init_from = values.pop("preset", None), values.pop("init_from", None)
    if (preset is None) == (init_from is None):
        raise ConfigError(
            "model: give either preset, the size to start from scratch, or init_from, the model to continue"
        )
    if init_from is not None:
        if values:
            raise ConfigError(f"model.{next(iter(values))}: cannot be changed together with init_from; remove it")
        return load_config(init_from)
    return SpadeT5Config.from_preset(preset, **{"vocab_size": vocab_size, **values})


def load_config(path: str | Path) -> SpadeT5Config:
    """Configuration of the model that `path` names."""
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is not None:
        return SpadeT5Config.from_dict(read_state(checkpoint)["model_config"])
    _check_model_folder(path)
    return SpadeT5Config.from_pretrained(path)


def load_model(
    path: str | Path,
    cls: type[Model],
    *,
    step: int | None = None,
    num_labels: int | None = None,
    device: torch.device | None = None,
) -> Model:
    """The model that `path` names, as the class `cls`, in evaluation mode; a classifier made of a pretrained model gets a fresh head.

    Args:
        path: exported folder, run folder, checkpoint folder, or name on the hub.
        cls: any SPADE-T5 model class.
        step: which checkpoint of a run folder; the newest by default.
        num_labels: outputs of a classification head; None: as saved.
        device: where the model goes; None leaves it on the CPU.

    Raises:
        ConfigError: nothing loadable is there.
        DataError: a checkpoint is damaged.
    """
    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    checkpoint = find_checkpoint(Path(path), step)
    if checkpoint is None:
        _check_model_folder(path)
        model = cls.from_pretrained(path, dtype=torch.float32, **labels)
    else:
        config = SpadeT5Config.from_dict({**read_state(checkpoint)["model_config"], **labels})
        model = build_model(cls, config, seed=0)
        load_weights_into(model, checkpoint)
    torch.nn.Module.to(model, device)
    return model.eval()


def load_tokenizer_of(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved with the model that `path` names."""
    checkpoint = find_checkpoint(Path(path))
    return load_tokenizer(path if checkpoint is None else checkpoint.parent.parent / "tokenizer")


def _check_model_folder(path: str | Path) -> None:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder (checkpoints/) nor an exported model (config.json)")
    if not folder.exists() and (folder.is_absolute() or str(path).count("/") != 1):
        raise ConfigError(f"{path}: no such folder; give a run folder, an exported model, or a name on the hub")

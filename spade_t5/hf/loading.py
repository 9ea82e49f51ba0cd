"""One way to name a model: an exported folder, a run folder, a checkpoint of a run, or a name on the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from spade_t5.checkpoint import latest_checkpoint, load_weights_into, read_state
from spade_t5.configuration import SpadeT5Config
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.folders import (
    CONFIG,
    GENERATION_CONFIG,
    MODEL_FILES,
    load_folder_weights,
    local_folder,
    read_by_library,
    read_settings,
)
from spade_t5.hf.tokenizer import load_tokenizer
from spade_t5.layers.ssm import SSMMixer
from spade_t5.messages import shown
from spade_t5.modeling import CLASSIFIER_PREFIX, SpadeT5PreTrainedModel

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


def resolve_model_config(model: dict[str, Any], vocab_size: int, *, may_change: Sequence[str] = ()) -> SpadeT5Config:
    """The model that a config's `model` section describes, with the tokenizer's vocabulary unless it sets its own.

    Args:
        model: the section.
        vocab_size: of the tokenizer.
        may_change: fields that the section may set beside `init_from`.

    Raises:
        ConfigError: neither `preset` nor `init_from` is given, or both, or a field is wrong; or there is no model to continue.
    """
    values = dict(model)
    preset, init_from = values.pop("preset", None), values.pop("init_from", None)
    if (preset is None) == (init_from is None):
        raise ConfigError(
            "model: give either preset, the size to start from scratch, or init_from, the model to continue"
        )
    if init_from is not None:
        refused = [name for name in values if name not in may_change]
        if refused:
            raise ConfigError(f"model.{refused[0]}: cannot be changed together with init_from; remove it")
        try:
            saved = load_config(init_from)
        except ConfigError as error:
            raise ConfigError(f"model.init_from: {error}") from None
        return _saved_config({**saved.to_dict(), **values}, Path(init_from))
    return SpadeT5Config.from_preset(preset, **{"vocab_size": vocab_size, **values})


def load_config(path: str | Path) -> SpadeT5Config:
    """Configuration of the model that `path` names."""
    checkpoint = find_checkpoint(Path(path))
    if checkpoint is not None:
        return _saved_config(read_state(checkpoint)["model_config"], checkpoint)
    return read_config(_model_folder(path, (CONFIG,)))


def read_config(folder: Path) -> SpadeT5Config:
    """Configuration of an exported model, which has known fields alone.

    Raises:
        ConfigError: it is that of another kind of model, or has an unknown field or a wrong value.
        DataError: it cannot be read, or asks for code.
    """
    values = read_settings(folder, CONFIG)
    model_type = values.get("model_type")
    if model_type != SpadeT5Config.model_type:
        raise ConfigError(
            f"{folder / CONFIG}: model_type {shown(model_type)}, expected {SpadeT5Config.model_type!r}; "
            "for a T5 or LongT5 run spade-t5 convert first"
        )
    return _saved_config(values, folder / CONFIG)


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
        path: exported folder, run folder, checkpoint folder, or name on the hub (`NAME@REVISION` for one commit of it).
        cls: any SPADE-T5 model class.
        step: which checkpoint of a run folder; the newest by default.
        num_labels: outputs of a classification head; None: as saved.
        device: where the model goes; None leaves it on the CPU.

    Raises:
        ConfigError: nothing loadable is there.
        DataError: what is there is damaged, or asks for code.
    """
    labels: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    checkpoint = find_checkpoint(Path(path), step)
    if checkpoint is None:
        folder = _model_folder(path, MODEL_FILES)
        config = read_config(folder)
        for name, value in labels.items():
            setattr(config, name, value)
        model = load_exported(folder, cls, config, seed=0)
    else:
        config = _saved_config({**read_state(checkpoint)["model_config"], **labels}, checkpoint)
        model = build_model(cls, config, seed=0)
        load_weights_into(model, checkpoint)
    torch.nn.Module.to(model, device)
    return model.eval()


def continue_model(path: str | Path, cls: type[Model], config: SpadeT5Config) -> Model:
    """The model that `path` names, to be trained on as `config` has it: with other time steps of its state-space layers, if it says so."""
    model = load_model(path, cls)
    if (config.dt_min, config.dt_max) != (model.config.dt_min, model.config.dt_max):
        for module in model.modules():
            if isinstance(module, SSMMixer):
                module.stretch_steps(config.dt_min, config.dt_max)
        model.config.dt_min, model.config.dt_max = config.dt_min, config.dt_max
    return model


def load_exported(folder: Path, cls: type[Model], config: SpadeT5Config, *, seed: int) -> Model:
    """The model in an exported folder, in fp32; a head of a classifier that the folder lacks is a fresh one.

    Args:
        folder: the folder.
        cls: any SPADE-T5 model class.
        config: its configuration, perhaps with another dropout or head than was saved.
        seed: of the fresh head.

    Raises:
        DataError: a file is damaged or missing, or the weights are not the model's.
    """
    model = build_model(cls, config, seed=seed)
    may_hold = cls._keys_to_ignore_on_load_unexpected or ()
    load_folder_weights(model, folder, may_lack=(CLASSIFIER_PREFIX,), may_hold=may_hold)
    if model.can_generate() and (folder / GENERATION_CONFIG).exists():
        values = read_settings(folder, GENERATION_CONFIG)
        with read_by_library(folder / GENERATION_CONFIG, "model"):
            model.generation_config = GenerationConfig.from_dict(values)
    return model


def load_tokenizer_of(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved with the model that `path` names."""
    checkpoint = find_checkpoint(Path(path))
    return load_tokenizer(path if checkpoint is None else checkpoint.parent.parent / "tokenizer")


def _model_folder(path: str | Path, files: Sequence[str]) -> Path:
    """The folder of an exported model; `files` of it are fetched if it lies on the hub.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).exists() and str(path).partition("@")[0].count("/") != 1:
        raise ConfigError(f"{path}: no such folder; give a run folder, an exported model, or a name on the hub")
    folder = local_folder(path, files=files)
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{path}: neither a run folder (checkpoints/) nor an exported model (config.json)")
    return folder


def _saved_config(values: Mapping[str, Any], origin: Path) -> SpadeT5Config:
    try:
        return SpadeT5Config.from_saved(values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None

"""Finds the config file that a command names: a path, or a recipe that ships with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from spade_t5.config import ConfigDict, apply_overrides, from_mapping, read_yaml
from spade_t5.errors import ConfigError

T = TypeVar("T")


def load_config(cls: type[T], name: str, words: list[str], *, kind: str) -> T:
    """The config in file `name`, with `key=value` words put over it.

    Args:
        cls: dataclass of the whole config.
        name: path of a YAML file, or name of a shipped recipe of this kind such as `sst2-text`.
        words: overrides of the command line.
        kind: folder of the shipped recipes, "pretrain" or "finetune".

    Raises:
        ConfigError: the file is missing, or its content is wrong.
    """
    return from_mapping(cls, apply_overrides(_read(name, kind), words))


def _read(name: str, kind: str) -> ConfigDict:
    path = Path(name)
    shipped = files("spade_t5") / "configs" / kind
    if not path.exists() and "/" not in name:
        recipe: Any = shipped / f"{name.removesuffix('.yaml')}.yaml"
        if not recipe.is_file():
            known = ", ".join(sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir()))
            raise ConfigError(f"config file {name}: not found, and no shipped recipe has this name; recipes: {known}")
        path = Path(str(recipe))
    return read_yaml(path)

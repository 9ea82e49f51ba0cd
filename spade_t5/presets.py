"""The model sizes we ship: `configs/model/*.yaml`, read from the installed package."""

from importlib import resources
from typing import Any

import yaml

from spade_t5.errors import ConfigError


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """Fields of `SpadeT5Config` that a preset sets.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in preset_names():
        raise ConfigError(f"preset: {name!r} is not one of {', '.join(preset_names())}")
    return dict(yaml.safe_load(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")))


def _folder() -> resources.abc.Traversable:
    return resources.files("spade_t5").joinpath("configs", "model")

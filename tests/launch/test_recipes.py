"""Every shipped pretraining recipe is a valid config, and its model is a known preset."""

from importlib.resources import files

import pytest

from spade_t5 import SpadeT5Config
from spade_t5.launch.config_files import load_recipe
from spade_t5.pretrain.run import PretrainConfig

RECIPES = sorted(entry.name.removesuffix(".yaml") for entry in (files("spade_t5") / "configs" / "pretrain").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_recipe(name: str) -> None:
    config = load_recipe(PretrainConfig, name, [], kind="pretrain")
    model = dict(config.model)
    SpadeT5Config.from_preset(model.pop("preset"), **model)
    assert config.training.schedule.factor(config.training.steps, config.training.steps) < 1

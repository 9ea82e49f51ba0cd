"""Every shipped pretraining recipe is a valid config, and its model is a known preset."""

from importlib.resources import files

import pytest

from spade_t5 import SpadeT5Config
from spade_t5.launch.config_files import load_recipe
from spade_t5.pretrain.objectives import Vocabulary
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.training.optimizers import RMSScaledAdamWConfig

RECIPES = sorted(entry.name.removesuffix(".yaml") for entry in (files("spade_t5") / "configs" / "pretrain").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_recipe(name: str) -> None:
    config = load_recipe(PretrainConfig, name, [], kind="pretrain")
    model = {key: value for key, value in config.model.items() if value is not None}
    if "init_from" not in model:
        SpadeT5Config.from_preset(model.pop("preset"), **model)
    assert config.training.schedule.factor(config.training.steps, config.training.steps) < 1


def test_the_budget_of_nanot5() -> None:
    config = load_recipe(PretrainConfig, "c4-base-16h", [], kind="pretrain")
    training = config.training
    assert (training.steps, training.global_batch_rows, training.clip_norm) == (53_332, 256, 1.0)
    assert (config.model, training.optimizer) == ({"preset": "base"}, RMSScaledAdamWConfig(learning_rate=2e-2))
    assert training.optimizer.learning_rate * training.schedule.factor(53_332, 53_332) == pytest.approx(1e-5)
    assert [training.schedule.factor(step, 53_332) for step in (5_000, 10_000)] == [0.5, 1.0]
    (denoiser,) = config.objective.denoisers(
        Vocabulary(vocab_size=32_100, pad_token_id=0, eos_token_id=1, sentinel_ids=tuple(range(32_000, 32_100)))
    )
    assert tuple(denoiser.lengths) == (568, 512, 114)

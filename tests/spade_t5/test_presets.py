"""The presets: sizes and initial loss."""

import math

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.errors import ConfigError
from spade_t5.presets import preset_names, read_preset

MILLION_PARAMETERS = {
    "tiny": 4.975,
    "mini": 15.523,
    "small": 77.652,
    "base": 249.007,
    "large": 785.580,
    "xl": 2858.811,
    "spade-base-release": 225.338,
}


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset: 'huge' is not one of base, large"):
        SpadeT5Config.from_preset("huge")


@pytest.mark.parametrize("name", MILLION_PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset(name, vocab_size=32128))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLION_PARAMETERS[name], abs=6e-4)


def test_every_preset_is_counted() -> None:
    assert preset_names() == sorted(MILLION_PARAMETERS)


@pytest.mark.parametrize("name", MILLION_PARAMETERS)
def test_initial_loss_is_near_ln_v(name: str) -> None:
    """Within 5 % of ln V, the traits of each preset kept; the larger ones narrowed and with fewer layers."""
    torch.manual_seed(0)
    size = {} if name in ("tiny", "mini") else {"d_model": 256, "d_ff": 512, "num_layers": 4, "num_decoder_layers": 4}
    config = SpadeT5Config.from_preset(name, **size)
    model = SpadeT5ForConditionalGeneration(config).eval()
    input_ids, labels = torch.randint(2, config.vocab_size, (2, 80)), torch.randint(2, config.vocab_size, (2, 30))
    with torch.no_grad():
        loss = model(input_ids, labels=labels).loss.item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_presets_set_only_known_fields() -> None:
    for name in preset_names():
        config = SpadeT5Config.from_preset(name)
        assert {key: getattr(config, key) for key in read_preset(name)} == read_preset(name)
    assert SpadeT5Config.from_preset("spade-base-release").dropout_rate == 0.1
    assert SpadeT5Config.from_preset("base").dropout_rate == 0.0

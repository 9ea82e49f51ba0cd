"""The configuration: JSON round trip and checks."""

from pathlib import Path

import pytest

from spade_t5 import SpadeT5Config
from spade_t5.errors import ConfigError


def test_json_round_trip(tmp_path: Path) -> None:
    config = SpadeT5Config.from_preset("tiny", global_layers=(1,), tie_word_embeddings=False, num_labels=5)
    config.save_pretrained(tmp_path)
    loaded = SpadeT5Config.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.layers_config() == config.layers_config()
    assert loaded.global_layers == [1]
    assert loaded.num_labels == 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_tying_and_scaling_are_independent(tmp_path: Path, tied: bool, scale: bool) -> None:
    SpadeT5Config(tie_word_embeddings=tied, scale_decoder_outputs=scale).save_pretrained(tmp_path)
    loaded = SpadeT5Config.from_pretrained(tmp_path)
    assert (loaded.tie_word_embeddings, loaded.scale_decoder_outputs) == (tied, scale)


def test_names_of_other_models_work() -> None:
    config = SpadeT5Config.from_preset("base")
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (768, 12, 12)
    assert SpadeT5Config(num_layers=3, global_layers=[2]).num_decoder_layers == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_modle": 8}, "d_modle: unknown model field; did you mean 'd_model'"),
        ({"d_model": "wide"}, "d_model: 'wide' is a str, expected int"),
        ({"d_model": 0}, "d_model: 0 is not positive"),
        ({"num_heads": True}, "num_heads: True is a bool"),
        ({"dropout_rate": 1.0}, "dropout_rate: 1.0"),
        ({"local_radius": -1}, "local_radius: -1 is negative"),
        ({"local_attention": "sliding"}, "local_attention: 'sliding' is not one of"),
        ({"global_layers": [8]}, "global_layers: 8 is not an encoder layer"),
        ({"global_layers": [0, 0]}, "names a layer twice"),
        ({"global_layers": 0}, "global_layers: 0 is not a list"),
        ({"global_mixer": "s5"}, "global_mixer: 's5' is not one of s4, s4d"),
        ({"fusion": "sum"}, "fusion: 'sum' is not one of concat, add, stack, gated"),
        ({"d_state": 63}, "d_state: 63 is odd"),
        ({"dt_min": 0.2}, "dt_min: 0.2 and dt_max: 0.1"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets: 30"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance: 16"),
        ({"attention_scale": 0.0}, "attention_scale: 0.0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon: 0.0"),
        ({"decoder_positions": -1}, "decoder_positions: -1"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"classifier_dropout": 1.5}, "classifier_dropout: 1.5"),
    ],
)
def test_wrong_values_are_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SpadeT5Config.from_preset("small", **fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_number_that_yaml_reads_as_text() -> None:
    assert SpadeT5Config.from_preset("tiny", dt_min="1e-4").dt_min == 1e-4

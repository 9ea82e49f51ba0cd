"""`SpadeT5Config`: the Hugging Face form of a model's configuration.

It adds to the layers' fields (`spade_t5.layers.config.LayersConfig`, which documents and checks them) the vocabulary,
the head, the special ids and Hugging Face's own fields, gives every field a default, and reads and writes JSON.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from spade_t5.config import from_mapping
from spade_t5.errors import ConfigError
from spade_t5.layers.config import LayersConfig
from spade_t5.messages import one_line, shown
from spade_t5.presets import read_preset


class SpadeT5Config(PreTrainedConfig):
    """Configuration of every SPADE-T5 model; a plain T5 1.1 or LongT5-local is a member of the family.

    The defaults are the preset `small`. Fields without a description here are those of `LayersConfig`.
    """

    model_type = "spade_t5"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
    }

    vocab_size: int = 32128
    """Rows of the embedding table V; at least the number of ids of the tokenizer."""
    tie_word_embeddings: bool = False
    """The output head is the embedding table."""
    scale_decoder_outputs: bool = False
    """Decoder states are multiplied by d_model ** -0.5 before the head (T5 1.0); independent of the tying."""
    classifier_dropout: float = 0.0
    """Dropout of the classification head."""
    is_encoder_decoder: bool = True
    use_cache: bool = True
    """Return and reuse keys and values while generating."""
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int = 0
    """First decoder input of every document."""

    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_decoder_layers: int | None = None
    """None: as many as encoder layers."""
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    local_radius: int = 127
    local_attention: str = "window"
    global_layers: list[int] | tuple[int, ...] = (0,)
    global_mixer: str = "s4"
    fusion: str = "concat"
    d_state: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    ssm_training: str = "frozen"
    norm_placement: str = "pre"
    norm_type: str = "rms"
    attention_scale: float = 1.0
    use_bias: bool = False
    decoder_positions: int = 0
    embedding_norm: bool = False
    final_norm: bool = True
    encoder_bias_shared: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Fills in what depends on other fields and checks everything.

        Raises:
            ConfigError: a value has the wrong type or contradicts another.
        """
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        super().__post_init__(**kwargs)
        layers = self.layers_config()
        for field in dataclasses.fields(layers):  # YAML 1.1 reads 1e-4 as text: keep the number it was read as
            value = getattr(layers, field.name)
            setattr(self, field.name, list(value) if isinstance(value, tuple) else value)
        if not isinstance(self.vocab_size, int) or self.vocab_size < 1:
            raise ConfigError(f"vocab_size: {self.vocab_size!r} is not a positive whole number")
        for name in ("tie_word_embeddings", "scale_decoder_outputs", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: {shown(getattr(self, name))} is not true or false")
        for name in ("pad_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 0 <= value < self.vocab_size):
                raise ConfigError(
                    f"{name}: {shown(value)} is not the number of a token, below vocab_size {self.vocab_size}"
                )
        if not isinstance(self.classifier_dropout, (int, float)) or not 0.0 <= self.classifier_dropout < 1.0:
            raise ConfigError(f"classifier_dropout: {self.classifier_dropout!r} is not a probability below 1")

    def layers_config(self) -> LayersConfig:
        """The part that decides the layers.

        Raises:
            ConfigError: a value has the wrong type or contradicts another.
        """
        return from_mapping(
            LayersConfig, {field.name: getattr(self, field.name) for field in dataclasses.fields(LayersConfig)}
        )

    @property
    def logit_scale(self) -> float:
        """Factor of the decoder states before the head."""
        return self.d_model**-0.5 if self.scale_decoder_outputs else 1.0

    @property
    def initial_head_std(self) -> float:
        """Spread of the head's initial weights: with normed decoder states (mean square 1), logits start with std 0.5.

        The initial loss is then ln V + 0.5 * 0.5^2. With std 1 weights, as Hugging Face initialises an untied head, it
        is about ten times as large.
        """
        return 0.5 * self.d_model**-0.5 / self.logit_scale

    @property
    def initial_embedding_std(self) -> float:
        """Spread of the initial embeddings: 1 as in T5, or the head's where the head is the embedding table."""
        return self.initial_head_std if self.tie_word_embeddings else 1.0

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "SpadeT5Config":
        """The configuration of a preset, with some fields replaced.

        Args:
            name: name of a file in `configs/model`, such as `small`.
            overrides: fields of this class, or Hugging Face's `num_labels`, `id2label`, `label2id`, `problem_type`.

        Raises:
            ConfigError: the preset or a field is unknown, or a value is wrong.
        """
        values = {**read_preset(name), **overrides}
        check_field_names(cls, values)
        return _made(lambda: cls(**values))

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> "SpadeT5Config":
        """The configuration that `to_dict` wrote, from a file that may come from anybody: it has known fields alone.

        Raises:
            ConfigError: a field is unknown, or a value is wrong.
        """
        check_field_names(cls, values, also=SAVED_NAMES)
        return _made(lambda: cls.from_dict(dict(values)))


MAX_LABELS = 100_000
SAVED_NAMES = ("model_type", "_name_or_path", "output_attentions", "torch_dtype")
"""Names that Hugging Face writes besides the fields."""


def check_field_names(cls: type[PreTrainedConfig], values: Mapping[str, Any], *, also: tuple[str, ...] = ()) -> None:
    """Refuses names that are no field of the configuration class, which Hugging Face would silently keep, and numbers that it would count to.

    Raises:
        ConfigError: with the nearest known name.
    """
    known = [field.name for field in dataclasses.fields(cls)] + ["num_labels"]
    num_labels = values.get("num_labels", 2)
    if type(num_labels) is not int or not 1 <= num_labels <= MAX_LABELS:  # names are made up for so many
        raise ConfigError(f"num_labels: {shown(num_labels)} is not a number of labels, 1 to {MAX_LABELS}")
    for key in values:
        if key not in known and key not in also:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see SpadeT5Config for the known fields"
            raise ConfigError(f"{key}: unknown model field; {hint}")


def _made(make: Callable[[], SpadeT5Config]) -> SpadeT5Config:
    """What `make` makes; Hugging Face's fields fail in whatever way a wrong value takes them.

    Raises:
        ConfigError: a value is wrong.
    """
    try:
        return make()
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"model: {one_line(str(error), max_bytes=300)}") from None

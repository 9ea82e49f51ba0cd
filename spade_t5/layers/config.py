"""Shape and variant of the layers: the one description of a model's body that the layers read.

`SpadeT5Config` carries the same fields in Hugging Face's form (defaults, JSON) and builds this dataclass, whose checks
are therefore the checks of both. Vocabulary, special ids and the output head are not the layers' business.
"""

from dataclasses import dataclass
from typing import Literal

from spade_t5.errors import ConfigError
from spade_t5.layers.fusion import FUSIONS
from spade_t5.layers.ssm import GLOBAL_MIXERS


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersConfig:
    """Everything that decides the layers of an encoder and a decoder."""

    d_model: int
    """Width D of the residual stream."""
    d_kv: int
    """Width K of one attention head."""
    d_ff: int
    """Width F inside the feed-forward blocks."""
    num_layers: int
    """Encoder layers."""
    num_decoder_layers: int
    """Decoder layers."""
    num_heads: int
    """Attention heads H."""
    relative_attention_num_buckets: int
    """Rows of a relative position bias table; in an encoder half of them are for keys to the right."""
    relative_attention_max_distance: int
    """Distance in tokens from which on all positions share the last bucket."""
    dropout_rate: float
    """Probability of dropping an entry of embeddings, sublayer outputs, attention weights; T5 1.1 pretrains with 0."""
    layer_norm_epsilon: float
    """Added to the mean square (or the variance) inside every norm."""
    feed_forward_proj: Literal["gated-gelu", "relu"]
    """Feed-forward block: gelu(x W0) * (x W1), or relu(x W)."""
    local_radius: int
    """Keys that an encoder query sees on each side, in tokens."""
    local_attention: Literal["window", "chunk", "full"]
    """Encoder attention: a sliding window, blocks of `local_radius + 1` tokens of a document, or every token of it."""
    global_layers: tuple[int, ...]
    """Numbers of the encoder layers that join a global mixer to their attention."""
    global_mixer: str
    """Name of the global branch in the registry of mixers: s4, s4d."""
    fusion: str
    """How the two branches of a global layer are joined: concat, add, stack or gated."""
    d_state: int
    """States N per channel of the state-space model."""
    dt_min: float
    """Smallest initial step size of the state-space model; the reach in tokens grows as 1 / dt_min."""
    dt_max: float
    """Largest initial step size of the state-space model."""
    ssm_training: Literal["frozen", "output", "full"]
    """Which of its parameters train: none, those after the state (C, D), or all."""
    norm_placement: Literal["pre", "post"]
    """Norm before each sublayer (T5) or after each residual sum."""
    norm_type: Literal["rms", "layer"]
    """RMSNorm without bias (T5) or LayerNorm with bias."""
    attention_scale: float
    """Factor of the attention scores: 1 in T5, d_kv ** -0.5 in ordinary transformers."""
    use_bias: bool
    """Biases in the feed-forward blocks and the decoder's attention projections; encoder attention never has any."""
    decoder_positions: int
    """0: relative position bias in the decoder (T5); n > 0: n learned absolute positions instead."""
    embedding_norm: bool
    """Norm on the embeddings of both stacks."""
    final_norm: bool
    """Norm on the output of both stacks."""
    encoder_bias_shared: bool
    """One relative bias table for all encoder layers (T5), or one table per layer."""

    def __post_init__(self) -> None:
        positive = ("d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "d_state")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give at least 1")
        if self.local_radius < 0:
            raise ConfigError(f"local_radius: {self.local_radius} is negative; give 0 (own token only) or more")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ConfigError(f"dropout_rate: {self.dropout_rate} is not a probability below 1")
        if not self.layer_norm_epsilon > 0.0:
            raise ConfigError(f"layer_norm_epsilon: {self.layer_norm_epsilon} is not positive; T5 uses 1e-6")
        if not self.attention_scale > 0.0:
            raise ConfigError(
                f"attention_scale: {self.attention_scale} is not positive; T5 uses 1, others d_kv ** -0.5"
            )
        if self.decoder_positions < 0:
            raise ConfigError(f"decoder_positions: {self.decoder_positions} is negative; give 0 for relative positions")
        self._check_buckets()
        self._check_global_layers()

    def _check_buckets(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4:
            raise ConfigError(f"relative_attention_num_buckets: {buckets} is not a multiple of 4; T5 uses 32")
        if distance <= buckets // 2:
            raise ConfigError(
                f"relative_attention_max_distance: {distance} leaves no room for the logarithmic buckets; "
                f"give more than {buckets // 2}"
            )

    def _check_global_layers(self) -> None:
        for layer in self.global_layers:
            if not 0 <= layer < self.num_layers:
                raise ConfigError(
                    f"global_layers: {layer} is not an encoder layer; give numbers from 0 to {self.num_layers - 1}"
                )
        if len(set(self.global_layers)) != len(self.global_layers):
            raise ConfigError(f"global_layers: {list(self.global_layers)} names a layer twice")
        if self.global_mixer not in GLOBAL_MIXERS:
            raise ConfigError(f"global_mixer: {self.global_mixer!r} is not one of {', '.join(sorted(GLOBAL_MIXERS))}")
        if self.fusion not in FUSIONS:
            raise ConfigError(f"fusion: {self.fusion!r} is not one of {', '.join(FUSIONS)}")
        if self.d_state % 2:
            raise ConfigError(f"d_state: {self.d_state} is odd; states come in conjugate pairs, give an even number")
        if not 0.0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"dt_min: {self.dt_min} and dt_max: {self.dt_max} do not satisfy 0 < dt_min <= dt_max")

    @property
    def encoder_bias_reach_tokens(self) -> int:
        """Largest offset with a bias of its own in the encoder: farther ones are not seen or share the last bucket."""
        if self.local_attention == "full":
            return self.relative_attention_max_distance
        return min(self.local_radius, self.relative_attention_max_distance)

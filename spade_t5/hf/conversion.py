"""Two-way conversion between SPADE-T5 and Hugging Face's T5 and LongT5 (local attention).

A T5 is a SPADE-T5 with `local_attention: full` and no global layers, a LongT5-local one with `window`; only names
differ, and `key_table` lists them. Hugging Face's configurations always claim tied weights and keep T5 1.1's difference in
`scale_decoder_outputs`, so whether the head is tied is read from the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LongT5Config, LongT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from spade_t5.configuration import SpadeT5Config
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.folders import CONFIG, MODEL_FILES, FolderWeights, local_folder, read_by_library, read_settings
from spade_t5.hf.loading import load_exported, read_config
from spade_t5.messages import shown
from spade_t5.modeling import SpadeT5ForConditionalGeneration

HFConfig = T5Config | LongT5Config
HFModel = T5ForConditionalGeneration | LongT5ForConditionalGeneration
Weights = Mapping[str, Tensor] | FolderWeights

EMBEDDINGS = "shared.weight"
"""Hugging Face's name of the embedding table of both stacks."""

SAME_NAMED_FIELDS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "dropout_rate",
    "layer_norm_epsilon",
    "feed_forward_proj",
    "scale_decoder_outputs",
    "pad_token_id",
    "eos_token_id",
)
"""Configuration fields that mean the same on both sides."""

HF_FIELDS = (
    *SAME_NAMED_FIELDS,
    "tie_word_embeddings",
    "decoder_start_token_id",
    "local_radius",
    "encoder_attention_type",
)
"""Fields that are read of a T5's or LongT5's configuration; what else a file holds is left alone."""

T5_ONLY_TRAITS: dict[str, Any] = {
    "global_layers": [],
    "norm_placement": "pre",
    "norm_type": "rms",
    "attention_scale": 1.0,
    "use_bias": False,
    "decoder_positions": 0,
    "embedding_norm": False,
    "final_norm": True,
    "encoder_bias_shared": True,
}
"""Values that our configuration must have for a T5 or LongT5 to express the model."""


def key_table(config: SpadeT5Config) -> dict[str, str]:
    """Our parameter names and Hugging Face's, for a configuration that T5 or LongT5 can express."""
    encoder_attention = "SelfAttention" if config.local_attention == "full" else "LocalSelfAttention"
    maps = ("wi", "wo") if config.feed_forward_proj == "relu" else ("wi_0", "wi_1", "wo")
    first = "block.0.layer.0"  # holds the table that all layers of its stack share
    table = {
        "encoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "lm_head.weight",
        "encoder.relative_attention_bias.weight": f"encoder.{first}.{encoder_attention}.relative_attention_bias.weight",
        "decoder.relative_attention_bias.weight": f"decoder.{first}.SelfAttention.relative_attention_bias.weight",
        "encoder.final_norm.weight": "encoder.final_layer_norm.weight",
        "decoder.final_norm.weight": "decoder.final_layer_norm.weight",
    }
    sublayers = {
        "encoder": (("self_attention", encoder_attention), ("feed_forward", "DenseReluDense")),
        "decoder": (
            ("self_attention", "SelfAttention"),
            ("cross_attention", "EncDecAttention"),
            ("feed_forward", "DenseReluDense"),
        ),
    }
    for stack, num_layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers or 0)):
        for i in range(num_layers):
            for j, (ours, theirs) in enumerate(sublayers[stack]):
                our_prefix, their_prefix = f"{stack}.layers.{i}.{ours}", f"{stack}.block.{i}.layer.{j}"
                table[f"{our_prefix}_norm.weight"] = f"{their_prefix}.layer_norm.weight"
                for name in maps if ours == "feed_forward" else ("q", "k", "v", "o"):
                    table[f"{our_prefix}.{name}.weight"] = f"{their_prefix}.{theirs}.{name}.weight"
    return table


def config_from_hf(hf_config: HFConfig, *, tie_word_embeddings: bool) -> SpadeT5Config:
    """Our configuration of a T5 or LongT5.

    Args:
        hf_config: its configuration.
        tie_word_embeddings: whether its head is its embedding table; HF's configuration does not know.

    Raises:
        ConfigError: it has a part that we do not: transient-global attention, another activation.
    """
    fields = {name: getattr(hf_config, name) for name in SAME_NAMED_FIELDS}
    if isinstance(hf_config, LongT5Config):
        if hf_config.encoder_attention_type != "local":
            raise ConfigError(
                f"encoder_attention_type: {hf_config.encoder_attention_type!r} cannot be converted, only 'local'"
            )
        fields.update(local_attention="window", local_radius=hf_config.local_radius)
    else:
        fields.update(local_attention="full")
    start_id = getattr(hf_config, "decoder_start_token_id", None)
    if start_id is None:
        start_id = hf_config.pad_token_id or 0
    fields.update(T5_ONLY_TRAITS, tie_word_embeddings=tie_word_embeddings, decoder_start_token_id=start_id)
    return SpadeT5Config(**fields)


def config_to_hf(config: SpadeT5Config) -> HFConfig:
    """The T5 or LongT5 configuration of a model that has nothing beyond them.

    Raises:
        ConfigError: a trait that neither T5 nor LongT5 has, such as a global layer.
    """
    for name, value in T5_ONLY_TRAITS.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name}: {getattr(config, name)!r} has no counterpart in T5 or LongT5, only {value!r} has"
            )
    if config.local_attention == "chunk":
        raise ConfigError("local_attention: 'chunk' has no counterpart in T5 or LongT5, only 'full' and 'window' have")
    fields = {name: getattr(config, name) for name in SAME_NAMED_FIELDS if name != "scale_decoder_outputs"}
    fields["decoder_start_token_id"] = config.decoder_start_token_id
    # in HF's constructors this argument decides the scaling of the decoder output, not the tying
    fields["tie_word_embeddings"] = config.scale_decoder_outputs
    if config.local_attention == "full":
        return T5Config(**fields)
    return LongT5Config(local_radius=config.local_radius, encoder_attention_type="local", **fields)


def state_dict_from_hf(hf_state_dict: "Weights", config: SpadeT5Config) -> dict[str, Tensor]:
    """Our parameters from a T5's or LongT5's; a tied head is left out."""
    table = key_table(config)
    if config.tie_word_embeddings:
        del table["lm_head.weight"]
    return {ours: hf_state_dict[theirs] for ours, theirs in table.items()}


def state_dict_to_hf(state_dict: Mapping[str, Tensor], config: SpadeT5Config) -> dict[str, Tensor]:
    """A T5's or LongT5's parameters from ours, with the copies of the embedding table that HF's stacks hold."""
    result = {theirs: state_dict[ours] for ours, theirs in key_table(config).items() if ours in state_dict}
    result.setdefault("lm_head.weight", result["shared.weight"])
    for stack in ("encoder", "decoder"):
        result[f"{stack}.embed_tokens.weight"] = result["shared.weight"]
    return result


def model_from_hf(hf_model: HFModel) -> SpadeT5ForConditionalGeneration:
    """A SPADE-T5 that computes what a T5 or LongT5 does, with copies of its weights.

    Raises:
        ConfigError: it has a part that we do not.
    """
    return _model_from_hf(hf_model.config, hf_model.state_dict()).train(hf_model.training)


def _model_from_hf(hf_config: HFConfig, weights: Weights) -> SpadeT5ForConditionalGeneration:
    embeddings = weights[EMBEDDINGS]
    is_tied = "lm_head.weight" not in weights or torch.equal(weights["lm_head.weight"], embeddings)
    model = SpadeT5ForConditionalGeneration(config_from_hf(hf_config, tie_word_embeddings=is_tied))
    model.to(embeddings.dtype)  # type: ignore[arg-type]  # a decorator of transformers hides the signature
    state_dict = state_dict_from_hf(weights, model.config)
    if is_tied:
        state_dict["lm_head.weight"] = state_dict["encoder.embed_tokens.weight"]
    for name, tensor in model.state_dict().items():
        if name in state_dict and state_dict[name].shape != tensor.shape:
            raise DataError(f"{name}: shape {tuple(state_dict[name].shape)}, by its config.json {tuple(tensor.shape)}")
    model.load_state_dict(state_dict)
    return model


def model_to_hf(model: SpadeT5ForConditionalGeneration) -> HFModel:
    """A T5 or LongT5 that computes what a SPADE-T5 without global layers does, with copies of its weights.

    Raises:
        ConfigError: the model has a trait that T5 and LongT5 lack.
    """
    hf_config = config_to_hf(model.config)
    hf_model: HFModel
    if isinstance(hf_config, T5Config):
        hf_model = T5ForConditionalGeneration(hf_config)
    else:
        hf_model = LongT5ForConditionalGeneration(hf_config)
    hf_model.to(model.dtype)  # type: ignore[arg-type]  # as above
    if not model.config.tie_word_embeddings:  # HF ties every head at construction; a parameter of its own unties it
        hf_model.lm_head.weight = nn.Parameter(torch.empty_like(hf_model.lm_head.weight))
    hf_model.load_state_dict(state_dict_to_hf(model.state_dict(), model.config))
    return hf_model.train(model.training)


def convert_checkpoint(source: str | Path, out_dir: Path) -> None:
    """Converts a saved model to the other side: T5 or LongT5 to SPADE-T5, SPADE-T5 to T5 or LongT5.

    Args:
        source: folder or hub name of the model, with `@` and a revision behind it if wanted.
        out_dir: folder to write the converted model to.

    Raises:
        ConfigError: the model is of another family, or cannot be expressed on the other side.
        DataError: its files are damaged, incomplete or no safetensors, or ask for code.
    """
    folder = local_folder(source, files=MODEL_FILES)
    values = read_settings(folder, CONFIG)
    model_type = values.get("model_type")
    if model_type == SpadeT5Config.model_type:
        dtype = FolderWeights(folder)["encoder.embed_tokens.weight"].dtype
        model = load_exported(folder, SpadeT5ForConditionalGeneration, read_config(folder), seed=0)
        model.to(dtype)  # type: ignore[arg-type]  # as above
        model_to_hf(model).save_pretrained(out_dir)
    elif model_type in ("t5", "longt5"):
        _converted(folder, values).save_pretrained(out_dir)
    else:
        raise ConfigError(
            f"{source}: a model of type {shown(model_type)} cannot be converted, only t5, longt5 and spade_t5 can"
        )


def _converted(folder: Path, values: Mapping[str, Any]) -> SpadeT5ForConditionalGeneration:
    """A T5 or LongT5 in a folder as a SPADE-T5.

    Raises:
        ConfigError: it has a part that we do not.
        DataError: its files are damaged, or lack weights.
    """
    cls: type[HFConfig] = T5Config if values["model_type"] == "t5" else LongT5Config
    known = {name: values[name] for name in HF_FIELDS if name in values}
    with read_by_library(folder / CONFIG, "model"):
        hf_config = cls(**known)
    weights = FolderWeights(folder)
    if EMBEDDINGS not in weights:
        raise DataError(
            f"{folder}: lacks {EMBEDDINGS}; some transformers wrote only copies of the embedding table, and which of them is right "
            "the file does not tell: load it with the version that wrote it, and save it again by another"
        )
    with read_by_library(folder, "model"):
        return _model_from_hf(hf_config, weights)

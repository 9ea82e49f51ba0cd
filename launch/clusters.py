"""How a recipe runs on machines of some size: what depends on them and not on what is learned.

A recipe says what is learned, with which global batch; a file of `configs/cluster` says for each preset how that is carried out: ZeRO stage,
micro-batch, activation checkpointing. So four files serve every recipe, and a run may move from one to another, as these settings are free to
change. A file gives the most tokens that a GPU runs at once. Rows of the micro-batch follow from that, from the length of the inputs, and from
the GPUs: a GPU's share of the global batch is divided evenly, and none is larger than the share.
"""

import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from spade_t5.config import ConfigDict, from_mapping, merge, read_yaml
from spade_t5.errors import ConfigError
from spade_t5.hf.loading import resolve_model_config
from spade_t5.launch.config_files import known_clusters
from spade_t5.messages import shown
from spade_t5.presets import preset_names, read_preset
from spade_t5.pretrain.objectives import Mixture, ObjectiveConfig
from spade_t5.pretrain.run import PretrainConfig

_SIZES = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers")


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetConfig:
    """How models of one size are trained on a cluster."""

    micro_batch_tokens: int
    """Most input tokens that one GPU runs through the model at once."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of `training` for this size, over those of the cluster."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens: {self.micro_batch_tokens} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Machines, and how models are trained on them."""

    nodes: int
    """Number of machines."""
    gpus_per_node: int
    """GPUs of each, and processes."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of `training` for every size."""
    presets: dict[str, Any]
    """A `PresetConfig` for each preset of models."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")

    @property
    def num_gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    def settings_for(self, preset: str, *, inputs_length: int, global_batch_rows: int) -> ConfigDict:
        """Settings to put over those of a recipe.

        Args:
            preset: size of the model.
            inputs_length: length of its rows, in tokens.
            global_batch_rows: rows of a step.

        Raises:
            ConfigError: nothing is said of this size, or there are more GPUs than rows.
        """
        if preset not in self.presets:
            raise ConfigError(
                f"presets: nothing about {shown(preset)}, the size of this model; known: {', '.join(self.presets)}"
            )
        if global_batch_rows < self.num_gpus:
            raise ConfigError(
                f"training.global_batch_rows: {global_batch_rows} are fewer than the {self.num_gpus} GPUs, of which "
                f"{self.num_gpus - global_batch_rows} would compute padding in every step; choose a smaller cluster, or raise it"
            )
        own = from_mapping(PresetConfig, self.presets[preset], f"presets.{preset}")
        share = math.ceil(global_batch_rows / self.num_gpus)
        num_micro_batches = math.ceil(share / max(1, own.micro_batch_tokens // inputs_length))
        rows = {"micro_batch_rows": math.ceil(share / num_micro_batches)}
        return {"training": merge(merge(self.training, own.training), rows)}


def load_cluster(name: str) -> ClusterConfig:
    """The cluster in a YAML file, or the shipped one of that name.

    Raises:
        ConfigError: there is none, or its content is wrong.
    """
    path = Path(name)
    if not path.is_file():
        if name.removesuffix(".yaml") not in known_clusters():
            raise ConfigError(
                f"--cluster: {shown(name)} is no file, and no shipped cluster has this name; clusters: {', '.join(known_clusters())}"
            )
        path = Path(str(files("spade_t5") / "configs" / "cluster" / f"{name.removesuffix('.yaml')}.yaml"))
    try:
        return from_mapping(ClusterConfig, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"--cluster {name}: {error}") from None


def settings_on(name: str, config: PretrainConfig) -> ConfigDict:
    """What a cluster says about a run, to be put over its recipe.

    Args:
        name: of the cluster.
        config: the run, as it would be without it.

    Raises:
        ConfigError: there is no such cluster, it does not know the model, or it has more GPUs than a step has rows.
    """
    cluster = load_cluster(name)
    preset = config.model.get("preset") or _preset_of(str(config.model.get("init_from")))
    try:
        return cluster.settings_for(
            str(preset),
            inputs_length=_inputs_length(config.objective),
            global_batch_rows=config.training.global_batch_rows,
        )
    except ConfigError as error:
        raise ConfigError(f"--cluster {name}: {error}") from None


def _preset_of(init_from: str) -> str:
    """The preset with the sizes of a model that is there.

    Raises:
        ConfigError: there is no model, or it has the sizes of none.
    """
    config = resolve_model_config({"init_from": init_from}, vocab_size=0)  # the model's own vocabulary counts
    for preset in preset_names():
        values = read_preset(preset)
        if all(getattr(config, name) == values[name] for name in _SIZES):
            return preset
    raise ConfigError(
        f"model.init_from: {shown(init_from)} has the sizes of no preset, so no cluster knows it; leave --cluster out"
    )


def _inputs_length(objective: ObjectiveConfig) -> int:
    """Length of the longest inputs that an objective makes."""
    if isinstance(objective, Mixture):
        return max(entry.denoiser.inputs_length for entry in objective.entries)
    return objective.inputs_length

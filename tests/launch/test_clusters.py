"""Shipped clusters: every size of model on every one, what wins over what, and what is refused."""

import functools
import math
from pathlib import Path

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.devices import find_accelerator
from spade_t5.errors import ConfigError
from spade_t5.launch.clusters import load_cluster
from spade_t5.launch.config_files import known_clusters, load_recipe
from spade_t5.memory.activations import Workload, trace_activations
from spade_t5.memory.parameters import Parameters
from spade_t5.memory.states import largest_rank
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.testing import documented
from spade_t5.training import TrainingConfig
from spade_t5.training.recomputation import Recomputation
from spade_t5.training.settings import Kind, kind_of

SIZES = ("small", "base", "large", "xl")
CLUSTERS = {"1-gpu": 1, "8-gpus": 8, "8-nodes": 64, "64-nodes": 512}


def training(recipe: str, cluster: str, *words: str) -> TrainingConfig:
    return load_recipe(PretrainConfig, recipe, list(words), kind="pretrain", cluster=cluster).training


def test_those_that_are_shipped() -> None:
    assert known_clusters() == sorted(CLUSTERS)
    assert {name: load_cluster(name).num_gpus for name in CLUSTERS} == CLUSTERS


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_size_on_a_cluster(size: str, cluster: str) -> None:
    plain = load_recipe(PretrainConfig, f"c4-t5-{size}", [], kind="pretrain").training
    found = training(f"c4-t5-{size}", cluster)
    # no rows are made up, and what is learned is not touched
    steps_rows = found.micro_batch_rows * CLUSTERS[cluster]
    assert math.ceil(plain.global_batch_rows / steps_rows) * steps_rows == plain.global_batch_rows
    changed = {name for name in TrainingConfig.__slots__ if getattr(found, name) != getattr(plain, name)}
    assert {name for name in changed if kind_of(f"training.{name}") is not Kind.FREE} == set()
    assert (found.deepspeed is None) == (cluster == "1-gpu")


@functools.cache
def parameters(size: str) -> Parameters:
    with torch.device("meta"):
        return Parameters.of(SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset(size, vocab_size=32_128)))


@functools.cache
def activations(size: str, recomputation: Recomputation) -> int:
    """Of the largest micro-batch on any cluster."""
    runs = [training(f"c4-t5-{size}", cluster) for cluster in CLUSTERS]
    rows = max(run.micro_batch_rows for run in runs if run.recomputation == recomputation)
    return trace_activations(
        SpadeT5Config.from_preset(size, vocab_size=32_128),
        Workload(
            rows=rows,
            inputs_length=512,
            targets_length=114,
            precision="bf16_autocast",
            recomputation=recomputation,
            backend="triton",
        ),
    ).peak


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_fits_in_80_gigabytes(size: str, cluster: str) -> None:
    found = training(f"c4-t5-{size}", cluster)
    assert found.precision == "bf16_autocast"
    states = largest_rank(found, parameters(size), world_size=CLUSTERS[cluster])
    needed = states.largest(activations(size, found.recomputation))
    # a tenth is left to CUDA, NCCL and what the allocator cannot use
    assert needed < 0.9 * find_accelerator("h100").memory_bytes


def test_micro_batches_follow_from_lengths_and_the_global_batch() -> None:
    cluster = load_cluster("8-gpus")
    tokens = cluster.presets["base"]["micro_batch_tokens"]

    def rows(inputs_length: int, global_batch_rows: int) -> int:
        settings = cluster.settings_for("base", inputs_length=inputs_length, global_batch_rows=global_batch_rows)
        return settings["training"]["micro_batch_rows"]

    assert rows(512, 8192) == tokens // 512
    assert rows(4096, 8192) == tokens // 4096
    assert rows(2 * tokens, 8192) == 1  # one row at least
    assert rows(512, 8 * (tokens // 512 + 8)) == (tokens // 512 + 8) // 2  # two equal parts, not a full one and a rest
    assert rows(512, 8) == 1


def test_the_command_line_wins_over_the_cluster_and_says_which_model_it_is() -> None:
    assert training("c4-t5-base", "8-gpus", "training.micro_batch_rows=3").micro_batch_rows == 3
    zero = training("c4-t5-base", "8-gpus", "training.deepspeed.zero_stage=3").deepspeed
    assert zero is not None
    assert zero.zero_stage == 3
    xl = training("c4-t5-base", "1-gpu", "model.preset=xl")
    assert (xl.micro_batch_rows, xl.gradient_checkpointing) == (16, "full")


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("nodes: 1\ngpus_per_node: 2\npresets: {base: {micro_batch_tokens: 1024}}")
    assert training("c4-base", str(path)).micro_batch_rows == 2
    path.write_text("nodes: 1\ngpus_per_node: 2\npresets: {base: {micro_batch_tokens: 0}}")
    with pytest.raises(ConfigError, match="micro_batch_tokens: 0 must be at least 1"):
        training("c4-base", str(path))


@pytest.mark.parametrize(
    ("recipe", "cluster", "message"),
    [
        ("c4-base", "9-gpus", "--cluster: '9-gpus' is no file, and no shipped cluster has this name; clusters: 1-gpu"),
        (
            "c4-base",
            "64-nodes",
            "--cluster 64-nodes: training.global_batch_rows: 128 are fewer than the 512 GPUs, of which 384 would compute padding",
        ),
        ("demo", "1-gpu", "--cluster 1-gpu: presets: nothing about 'tiny', the size of this model; known: small"),
    ],
)
def test_what_is_refused(recipe: str, cluster: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        training(recipe, cluster)
    assert message in str(caught.value)
    documented(str(caught.value))

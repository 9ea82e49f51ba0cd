"""Config files of DeepSpeed and accelerate as input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from spade_t5.config import from_mapping, merge, to_mapping
from spade_t5.errors import ConfigError
from spade_t5.launch.accelerate_config import read_accelerate_config
from spade_t5.launch.deepspeed_config import read_deepspeed_config
from spade_t5.testing import documented
from spade_t5.training.config import TrainingConfig
from spade_t5.training.deepspeed import deepspeed_json

ZERO_2 = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 3e-7}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 3e-5,
            "warmup_num_steps": 500,
            "total_num_steps": 9000,
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "steps_per_print": 2000,
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 16,
    "wall_clock_breakdown": False,
}
ZERO_3 = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "none"},
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e6,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 1,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(content))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_deepspeed_config(path)
    documented(str(error.value))
    return str(error.value)


def test_a_file_for_zero_2_becomes_settings(tmp_path: Path) -> None:
    assert read_deepspeed_config(written(tmp_path, ZERO_2)) == {
        "training": {
            "steps": 9000,
            "global_batch_rows": 256,
            "micro_batch_rows": 16,
            "clip_norm": 0.5,
            "log_every_steps": 2000,
            "precision": "bf16",
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-5,
                "beta1": 0.8,
                "beta2": 0.95,
                "epsilon": 1e-7,
                "weight_decay": 3e-7,
            },
            "schedule": {"name": "linear", "warmup_steps": 500},
            "deepspeed": {"zero_stage": 2, "offload_optimizer": True, "bucket_numel": 200_000_000},
        }
    }


def test_what_is_auto_stays_the_recipes(tmp_path: Path) -> None:
    settings = read_deepspeed_config(written(tmp_path, ZERO_3))
    assert settings == {
        "training": {
            "optimizer": {"name": "adamw"},
            "deepspeed": {"zero_stage": 3, "offload_parameters": False, "persistence_threshold_numel": 1_000_000},
        }
    }
    recipe = {"training": {"optimizer": {"name": "adamw", "learning_rate": 0.01}, "deepspeed": {"zero_stage": 1}}}
    assert merge(recipe, settings)["training"]["optimizer"] == {"name": "adamw", "learning_rate": 0.01}


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_own_json_reads_back_as_the_config_it_was_made_from(tmp_path: Path, precision: str, stage: int) -> None:
    base = {"steps": 10, "global_batch_rows": 1, "micro_batch_rows": 1}
    given = {
        "global_batch_rows": 64,
        "micro_batch_rows": 8,
        "clip_norm": 0.25,
        "precision": precision,
        "deepspeed": {"zero_stage": stage, "offload_optimizer": True, "bucket_numel": 1000},
    }
    config = from_mapping(TrainingConfig, merge(base, given))
    assert config.deepspeed is not None
    content = deepspeed_json(config, config.deepspeed, 2)
    del content["steps_per_print"]  # never: lines of progress are the engine's
    back = read_deepspeed_config(written(tmp_path, content))["training"]
    assert to_mapping(from_mapping(TrainingConfig, merge(base, back))) == to_mapping(config)


def test_every_key_without_a_counterpart_is_named_with_what_to_do(tmp_path: Path) -> None:
    message = refused(
        written(
            tmp_path,
            {
                "fp16": {"enabled": True},
                "gradient_accumulation_steps": 4,
                "optimizer": {"type": "OneBitAdam", "params": {"lr": 1}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/nvme"},
                    "zero_quantized_weights": True,
                    "reduce_bucket_size": 100,
                    "allgather_bucket_size": 200,
                    "overlap_comm": True,
                },
                "activation_checkpointing": {"partition_activations": True},
                "flops_profiler": {"enabled": False},
                "elasticity": {"enabled": True},
                "train_micro_batch_size_per_gpu": "many",
                "gradient_cliping": 1.0,
            },
        )
    )
    for key, remedy in (
        ("fp16.enabled: True", "training.precision=bf16_autocast"),
        ("gradient_accumulation_steps: 4", "give train_batch_size"),
        ("optimizer.type: 'OneBitAdam'", "set training.optimizer"),
        ("scheduler.params.warmup_type: 'log'", 'write "linear"'),
        ("zero_optimization.offload_param.device: 'nvme'", "write cpu or none"),
        ("zero_optimization.zero_quantized_weights: True", "remove it"),
        ("zero_optimization.allgather_bucket_size: 200", "write 100"),
        ("zero_optimization.overlap_comm: True", "DeepSpeed's default is kept"),
        ("activation_checkpointing: ", "set training.gradient_checkpointing"),
        ("elasticity: ", "--nnodes MIN:MAX"),
        ("train_micro_batch_size_per_gpu: 'many'", "give a number"),
        ("gradient_cliping: 1.0", "is not known here; remove it"),
    ):
        (part,) = [part for part in message.split("); ") if key in part]
        assert remedy in part
    assert "flops_profiler" not in message


def test_no_key_of_deepspeeds_zero_is_ignored_in_silence(tmp_path: Path) -> None:
    taken = read_deepspeed_config(written(tmp_path, {"zero_optimization": {"stage": 3}}))
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        key = field.alias or name
        if key == "stage":
            continue
        path = written(tmp_path, {"zero_optimization": {"stage": 3, key: 12345}})
        said = ""
        try:
            is_taken = read_deepspeed_config(path) != taken
        except ConfigError as error:
            is_taken, said = False, str(error)
        assert is_taken or key in said, key


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"a": 1, "a": 2}', "a key comes twice"),
        ("[1]", "is not a mapping"),
        ("[" * 100_000, "not valid JSON"),
        ('{"optimizer": 3}', "optimizer"),
        (" " * 300_000, "larger than"),
    ],
)
def test_a_broken_file_is_one_message(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert reason in refused(path)
    assert "No such file" in refused(tmp_path / "none.json")


def accelerate_file(tmp_path: Path, **values: Any) -> Path:
    """As `accelerate config` writes it."""
    defaults: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "bf16",
        "use_cpu": False,
        "debug": False,
        "num_processes": 16,
        "num_machines": 2,
        "main_process_ip": "10.0.0.1",
        "main_process_port": 29500,
        "same_network": True,
        "deepspeed_config": {
            "zero_stage": 3,
            "offload_optimizer_device": "cpu",
            "offload_param_device": "none",
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "zero3_init_flag": False,
            "zero3_save_16bit_model": True,
            "deepspeed_multinode_launcher": "standard",
            "deepspeed_hostfile": "hosts",
        },
    }
    path = tmp_path / "accelerate.yaml"
    ClusterConfig(**(defaults | values)).to_yaml_file(path)
    return path


def test_an_accelerate_file_for_deepspeed_on_two_machines(tmp_path: Path) -> None:
    config = read_accelerate_config(accelerate_file(tmp_path))
    assert (config.num_nodes, config.num_ranks, config.hostfile, config.address) == (2, 8, Path("hosts"), "10.0.0.1")
    assert config.environment == {}
    assert config.settings == {
        "training": {
            "precision": "bf16",
            "clip_norm": 1.0,
            "deepspeed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": False},
        }
    }


def test_an_accelerate_file_that_names_one_of_deepspeed(tmp_path: Path) -> None:
    inner = written(tmp_path, ZERO_3)
    path = accelerate_file(tmp_path, deepspeed_config={"deepspeed_config_file": str(inner), "zero3_init_flag": False})
    settings = read_accelerate_config(path).settings["training"]
    assert settings["deepspeed"]["persistence_threshold_numel"] == 1_000_000
    assert settings["precision"] == "bf16"


def test_the_file_of_accelerates_own_defaults(tmp_path: Path) -> None:
    path = tmp_path / "default.yaml"
    assert write_basic_config(mixed_precision="no", save_location=str(path))
    content = yaml.safe_load(path.read_text())
    config = read_accelerate_config(path)
    assert (config.num_nodes, config.num_ranks) == (1, content["num_processes"])
    assert config.settings == {"training": {"precision": "fp32"}}


def test_devices_of_an_accelerate_file_are_a_variable(tmp_path: Path) -> None:
    one = {"num_machines": 1, "num_processes": 2, "distributed_type": "MULTI_GPU", "deepspeed_config": {}}
    gpus = read_accelerate_config(accelerate_file(tmp_path, **one, gpu_ids="0,3"))
    assert gpus.environment == {"CUDA_VISIBLE_DEVICES": "0,3"}
    assert gpus.settings == {"training": {"precision": "bf16_autocast"}}
    cpus = read_accelerate_config(accelerate_file(tmp_path, **one, use_cpu=True))
    assert cpus.environment == {"CUDA_VISIBLE_DEVICES": ""}


def test_what_accelerate_has_alone_is_refused_at_once(tmp_path: Path) -> None:
    path = accelerate_file(
        tmp_path,
        distributed_type="FSDP",
        deepspeed_config={},
        fsdp_config={"fsdp_version": 2},
        mixed_precision="fp8",
        num_processes=3,
        machine_rank=1,
        gpu_ids="0",
        dynamo_config={"dynamo_backend": "INDUCTOR"},
    )
    with pytest.raises(ConfigError) as error:
        read_accelerate_config(path)
    documented(str(error.value))
    for key in ("distributed_type", "fsdp_config", "mixed_precision", "num_processes", "machine_rank", "dynamo_config"):
        assert f"{key}: " in str(error.value), key

"""The file that `accelerate config` writes as input: how many processes on how many machines, and settings of `training`."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from spade_t5.config import ConfigDict, merge, read_yaml
from spade_t5.errors import ConfigError
from spade_t5.launch.deepspeed_config import deepspeed_settings, read_deepspeed_config
from spade_t5.launch.foreign_config import Section, check_refused

_SHARDING = "is not supported; shard by DeepSpeed, distributed_type: DEEPSPEED or training.deepspeed.zero_stage"
_TPU = "runs on GPUs and CPUs only; remove it"
_TYPES = {
    **dict.fromkeys(("FSDP", "MEGATRON_LM", "TP"), _SHARDING),
    **dict.fromkeys(
        ("XLA", "TPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_HPU", "MULTI_NEURON"),
        _TPU,
    ),
}
_FP16 = "fp16 overflows in T5's feed-forward layers; write bf16"
_REMEDIES = {
    "commands": _TPU,
    "command_file": _TPU,
    "debug": "ranks compare what they do in every step; remove it",
    "downcast_bf16": _TPU,
    "dynamo_config": "blocks are compiled by training.compile=true; remove it",
    "enable_cpu_affinity": "is not supported; remove it",
    "fp8_config": "is not supported; remove it",
    "fsdp_config": _SHARDING,
    "megatron_lm_config": _SHARDING,
    "mpirun_config": "processes are not started by mpirun; remove it, or name one in --remote-shell",
    "parallelism_config": _SHARDING,
    "tpu_env": _TPU,
    "tpu_name": _TPU,
    "tpu_use_cluster": _TPU,
    "tpu_use_sudo": _TPU,
    "tpu_vm": _TPU,
    "tpu_zone": _TPU,
}
_DEEPSPEED_REMEDIES = {
    "deepspeed_exclusion_filter": "leave the hosts out of the hostfile",
    "deepspeed_inclusion_filter": "name only these hosts in the hostfile",
    "deepspeed_moe_layer_cls_names": "the model has no experts; remove it",
    "zero3_init_flag": "models are made whole and sharded then; write false",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AccelerateConfig:
    """What such a file says."""

    num_nodes: int
    """Machines."""
    num_ranks: int
    """Processes on each."""
    hostfile: Path | None = None
    """The machines' names, a hostfile of DeepSpeed."""
    address: str | None = None
    """That of the first machine, as all others reach it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of all processes."""
    settings: ConfigDict = field(default_factory=dict)
    """What is to be merged over a recipe."""


def read_accelerate_config(path: Path) -> AccelerateConfig:
    """Reads the file.

    Raises:
        ConfigError: it cannot be read, or has keys without a counterpart: naming all of them, each with what to do.
    """
    values = Section(read_yaml(path))
    values.expect(
        "compute_environment", ("LOCAL_MACHINE",), "start the processes by `spade-t5 launch`; write LOCAL_MACHINE"
    )
    kind = values.word("distributed_type", _TYPES)
    num_nodes, num_ranks = _shape(values)
    values.expect(
        "machine_rank", (0,), "the first machine starts all others; run the command there, with machine_rank: 0"
    )
    values.expect("rdzv_backend", ("static", "c10d"), "processes find each other by `spade-t5 launch`; remove it")
    values.expect("main_training_function", ("main",), "is for notebooks; remove it")
    values.expect("same_network", (True, False), "give true or false")
    # Ours is free and new at each start.
    values.whole("main_process_port")
    deepspeed = values.section("deepspeed_config")
    hostfile = deepspeed.word("deepspeed_hostfile")
    settings = _deepspeed(deepspeed) if kind == "DEEPSPEED" else {}
    if kind != "DEEPSPEED":
        deepspeed.drop()
    precision = _precision(values, settings)
    if precision is not None:
        settings = merge(settings, {"training": {"precision": precision}})
    config = AccelerateConfig(
        num_nodes=num_nodes,
        num_ranks=num_ranks,
        hostfile=None if hostfile is None else Path(hostfile),
        address=values.word("main_process_ip"),
        environment=_devices(values, num_nodes),
        settings=settings,
    )
    if values.take("downcast_bf16") not in (None, False, "no"):
        values.refuse("downcast_bf16", True, _TPU)
    values.finish(_REMEDIES)
    check_refused(path, values.refused)
    return config


def _shape(values: Section) -> tuple[int, int]:
    """Number of machines, and of processes on each."""
    num_nodes, num_processes = values.whole("num_machines") or 1, values.whole("num_processes")
    if num_processes is None or num_processes < 1 or num_nodes < 1 or num_processes % num_nodes:
        values.refuse(
            "num_processes", num_processes, f"must be a multiple of num_machines, {num_nodes}; correct one of them"
        )
        return 1, 1
    return num_nodes, num_processes // num_nodes


def _devices(values: Section, num_nodes: int) -> dict[str, str]:
    """The variable that says which GPUs are used."""
    if values.flag("use_cpu"):
        values.take("gpu_ids")
        return {"CUDA_VISIBLE_DEVICES": ""}
    gpus = values.take("gpu_ids")
    if gpus in (None, "all"):
        return {}
    if num_nodes > 1:
        values.refuse("gpu_ids", gpus, "holds for one machine; write all, or set CUDA_VISIBLE_DEVICES on each")
        return {}
    return {"CUDA_VISIBLE_DEVICES": str(gpus)}


def _precision(values: Section, settings: ConfigDict) -> str | None:
    word = values.take("mixed_precision")
    if word in (False, "no"):  # YAML reads a bare no as false
        return "fp32"
    if word == "bf16":
        # As accelerate does: DeepSpeed's own bf16 where it shards, autocast elsewhere.
        shards = settings.get("training", {}).get("deepspeed", {}).get("zero_stage", 0) > 0
        return "bf16" if shards else "bf16_autocast"
    if word is not None:
        values.refuse("mixed_precision", word, _FP16 if word == "fp16" else "is not supported; write bf16 or no")
    return None


def _deepspeed(section: Section) -> ConfigDict:
    file = section.word("deepspeed_config_file")
    settings = {} if file is None else read_deepspeed_config(Path(file))
    as_deepspeed = {
        "gradient_accumulation_steps": section.take("gradient_accumulation_steps"),
        "gradient_clipping": section.take("gradient_clipping"),
        "zero_optimization": {
            "stage": section.take("zero_stage"),
            "offload_optimizer": {"device": section.take("offload_optimizer_device")},
            "offload_param": {"device": section.take("offload_param_device")},
        },
    }
    for key in ("offload_optimizer_nvme_path", "offload_param_nvme_path"):
        section.expect(key, ("none",), "NVMe is not used here; remove it")
    # Checkpoints and exports hold whole weights, whatever this says.
    section.expect("zero3_save_16bit_model", (True, False), "give true or false")
    section.expect(
        "deepspeed_multinode_launcher",
        ("standard", "pdsh"),
        "name the command that reaches a host in --remote-shell; write standard",
    )
    own = Section(as_deepspeed, "deepspeed_config.", section.refused)
    settings = merge(settings, deepspeed_settings(own))
    section.finish(_DEEPSPEED_REMEDIES)
    return settings


def add_shape_option(parser: argparse.ArgumentParser) -> None:
    """The file as an option of a form of `spade-t5 launch`."""
    parser.add_argument(
        "--accelerate-config",
        type=Path,
        metavar="FILE",
        help="file written by `accelerate config`: processes, nodes and hosts that are not given otherwise, and settings of the run",
    )


def take_over_shape(arguments: argparse.Namespace) -> None:
    """Fills the options of a launch that were not given from the file, and hands its settings on to the launched command.

    Raises:
        ConfigError: the file cannot be taken over, or nobody says how many processes there are.
    """
    path = arguments.accelerate_config
    if path is not None:
        config = read_accelerate_config(path)
        is_one_machine = not hasattr(arguments, "nnodes")
        if is_one_machine and config.num_nodes > 1:
            raise ConfigError(
                f"{path}: has num_machines: {config.num_nodes}; use launch hostfile, slurm or k8s, or write 1"
            )
        _fill(arguments, "nproc_per_node", config.num_ranks)
        _fill(arguments, "nnodes", (config.num_nodes, config.num_nodes))
        if hasattr(arguments, "hostfile"):
            _fill(arguments, "hostfile", config.hostfile)
            _fill(arguments, "address", config.address)
        if hasattr(arguments, "env"):
            arguments.env += [f"{name}={value}" for name, value in config.environment.items()]
        else:
            os.environ.update(config.environment)
        command, *rest = arguments.words
        arguments.words = [command, "--accelerate-config", str(path), *rest]
    for name, what in (("nproc_per_node", "processes on each node"), ("hostfile", "file with the machines")):
        has_slots = name == "nproc_per_node" and hasattr(arguments, "hostfile")
        if getattr(arguments, name, 0) is None and not has_slots:
            raise ConfigError(f"--{name.replace('_', '-')}: the {what}; give it, or --accelerate-config with it")


def _fill(arguments: argparse.Namespace, name: str, value: object) -> None:
    if getattr(arguments, name, 0) is None:
        setattr(arguments, name, value)

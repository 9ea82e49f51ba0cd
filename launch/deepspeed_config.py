"""DeepSpeed's own JSON file as input: what it says, as settings of `training`.

The engine derives its own configuration of DeepSpeed from `training` (`spade_t5.training.deepspeed.deepspeed_json`). This is the way back, for
files that exist already. "auto" leaves a setting to the recipe. A key that would be ignored is refused instead, unless its value is what happens anyway.
"""

from pathlib import Path
from typing import Any

from spade_t5.config import ConfigDict
from spade_t5.launch.foreign_config import Section, check_refused, read_json

_FP16 = "fp16 overflows in T5's feed-forward layers; set bf16.enabled, or training.precision=bf16_autocast"
_DEFAULT = "remove it, DeepSpeed's default is kept"
_DERIVED = (
    "accumulation follows from training.global_batch_rows and the number of processes, so that it may change; give train_batch_size, and "
    'remove it or write "auto"'
)
_REMEDIES = {
    "amp": _FP16,
    "activation_checkpointing": "is for models that call DeepSpeed's own; set training.gradient_checkpointing",
    "aio": "is for NVMe, which is not used here; remove it",
    "autotuning": "run `spade-t5 plan`, which says the largest micro-batch, and remove it",
    "checkpoint": "checkpoints are this package's own (docs/checkpoints.md); remove it",
    "communication_data_type": "gradients are reduced in the precision in which they are accumulated; remove it",
    "comms_logger": "metrics.jsonl has the time that communication takes; remove it",
    "compression_training": "is not supported; remove it",
    "csv_monitor": "metrics.jsonl has every step; remove it",
    "curriculum_learning": "is not supported; remove it",
    "data_efficiency": "is not supported; remove it",
    "elasticity": "restart with fewer nodes by `spade-t5 launch --nnodes MIN:MAX`; remove it",
    "flops_profiler": "metrics.jsonl has the FLOPs of every step; remove it",
    "gradient_predivide_factor": _DEFAULT,
    "prescale_gradients": _DEFAULT,
    "sparse_attention": "the model's attention has a window of its own, model.local_radius; remove it",
    "sparse_gradients": "is not supported; remove it",
    "tensorboard": "runs write it to tensorboard/ in the run folder; remove it",
    "wandb": "set training.wandb, and remove it",
}
_ZERO_REMEDIES = {
    "cpu_offload": "write offload_optimizer: {device: cpu}",
    "cpu_offload_params": "write offload_param: {device: cpu}",
    "zero_quantized_weights": "is not supported; remove it",
    "zero_quantized_gradients": "is not supported; remove it",
    "zero_quantized_nontrainable_weights": "is not supported; remove it",
    "stage3_prefetch_bucket_size": _DEFAULT,
    "overlap_comm": _DEFAULT,
}
# What DeepSpeed does anyway where this package derives its configuration.
_ZERO_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "allgather_partitions": (True,),
    "contiguous_gradients": (True,),
    "elastic_checkpoint": (False,),
    "ignore_unused_parameters": (True,),
    "load_from_fp32_weights": (True,),
    "reduce_scatter": (True,),
    "round_robin_gradients": (False,),
    "stage3_max_live_parameters": (1_000_000_000, 1e9),
    "stage3_max_reuse_distance": (1_000_000_000, 1e9),
    "stage3_prefetch_bucket_size": (50_000_000, 5e7),
    "sub_group_size": (1_000_000_000, 1e9),
    # Checkpoints and exports hold whole weights, whatever this says.
    "stage3_gather_16bit_weights_on_model_save": (True, False),
    "stage3_gather_fp16_weights_on_model_save": (True, False),
}


def read_deepspeed_config(path: Path) -> ConfigDict:
    """The settings in a DeepSpeed JSON file, to be merged over a recipe.

    Raises:
        ConfigError: the file is no JSON, or has keys without a counterpart: naming all of them, each with what to do.
    """
    section = Section(read_json(path))
    settings = deepspeed_settings(section)
    check_refused(path, section.refused)
    return settings


def deepspeed_settings(config: Section) -> ConfigDict:
    """The settings that a DeepSpeed configuration means; what has no counterpart is noted in `config.refused`."""
    training: ConfigDict = {}
    _put(training, **_batch(config), clip_norm=config.number("gradient_clipping"))
    _put(training, log_every_steps=config.whole("steps_per_print"), precision=_precision(config))
    _put(training, deepspeed=_zero(config.section("zero_optimization")) or None)
    optimizer = _optimizer(config.section("optimizer"))
    schedule, peak, steps = _schedule(config.section("scheduler"))
    if peak is not None and optimizer.setdefault("learning_rate", peak) != peak:
        config.refuse(
            "scheduler.params.warmup_max_lr", peak, "differs from the optimizer's lr; write the same, or auto"
        )
    _put(training, optimizer=optimizer or None, schedule=schedule or None, steps=steps)
    config.expect("wall_clock_breakdown", (True, False), "give true or false")  # metrics.jsonl has them anyway
    config.expect("zero_allow_untested_optimizer", (True, False), "give true or false")
    config.expect(
        "zero_force_ds_cpu_optimizer", (False,), "the optimizers are PyTorch's, nothing is compiled; write false"
    )
    config.expect("gradient_predivide_factor", (1, 1.0), _REMEDIES["gradient_predivide_factor"])
    config.finish(_REMEDIES)
    return {"training": training} if training else {}


def _put(mapping: ConfigDict, **values: Any) -> None:
    """Writes the values that something was said about."""
    mapping.update({key: value for key, value in values.items() if value is not None})


def _batch(config: Section) -> ConfigDict:
    rows, micro_rows = config.whole("train_batch_size"), config.whole("train_micro_batch_size_per_gpu")
    accumulation = config.whole("gradient_accumulation_steps")
    if accumulation is not None and accumulation != 1:
        if rows is None:
            config.refuse("gradient_accumulation_steps", accumulation, _DERIVED)
        elif micro_rows is not None and rows % (micro_rows * accumulation):
            config.refuse(
                "train_batch_size",
                rows,
                f"is no multiple of {micro_rows} rows in {accumulation} micro-batches; correct one of them",
            )
    return {"global_batch_rows": rows, "micro_batch_rows": micro_rows}


def _precision(config: Section) -> str | None:
    """training.precision; None if nothing is said."""
    fp16 = config.section("fp16")
    if fp16.flag("enabled"):
        config.refuse("fp16.enabled", True, _FP16)
    fp16.drop()  # what it says of loss scales means nothing
    autocast = config.section("torch_autocast")
    bf16 = config.section("bf16" if "bf16" in config else "bfloat16")
    is_autocast, is_bf16 = autocast.flag("enabled"), bf16.flag("enabled")
    if is_autocast:
        autocast.expect("dtype", ("bfloat16", "torch.bfloat16"), _FP16)
    else:
        autocast.drop()
    autocast.finish({"lower_precision_safe_modules": "the model says itself what stays in fp32; remove it"})
    bf16.finish({"immediate_grad_update": _DEFAULT, "check_grad_overflow": _DEFAULT})
    types = config.section("data_types")
    types.expect("grad_accum_dtype", ("fp32",), "gradients are accumulated in fp32; write fp32")
    types.finish()
    if is_autocast and is_bf16:
        config.refuse("bf16.enabled", True, "contradicts torch_autocast; keep one of them")
    if is_autocast:
        return "bf16_autocast"
    if is_bf16:
        return "bf16"
    return "fp32" if is_bf16 is False else None


def _zero(zero: Section) -> ConfigDict:
    deepspeed: ConfigDict = {}
    reduce, gather = zero.whole("reduce_bucket_size"), zero.whole("allgather_bucket_size")
    if reduce is not None and gather is not None and reduce != gather:
        zero.refuse(
            "allgather_bucket_size", gather, f"buckets have one size here; write {reduce}, that of reduce_bucket_size"
        )
    _put(
        deepspeed,
        zero_stage=zero.whole("stage"),
        offload_optimizer=_offload(zero.section("offload_optimizer")),
        offload_parameters=_offload(zero.section("offload_param")),
        hpz_partition_size=zero.whole("zero_hpz_partition_size"),
        bucket_numel=reduce if reduce is not None else gather,
        persistence_threshold_numel=zero.whole("stage3_param_persistence_threshold"),
    )
    for key, values in _ZERO_DEFAULTS.items():
        zero.expect(key, values, _DEFAULT)
    zero.finish(_ZERO_REMEDIES)
    return deepspeed


def _offload(section: Section) -> bool | None:
    """Whether something is kept in host memory; None if nothing is said."""
    device = section.word("device", {"nvme": "NVMe is not used here; write cpu or none"})
    section.expect(
        "pin_memory", (True, *((False,) if device in (None, "none") else ())), "host memory is pinned here; write true"
    )
    section.expect("ratio", (1, 1.0), _DEFAULT)
    if device in (None, "none"):
        section.drop()
    section.finish(dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), "is for NVMe; remove it"))
    return None if device is None else device == "cpu"


def _optimizer(section: Section) -> ConfigDict:
    kind, params = section.word("type"), section.section("params")
    optimizer: ConfigDict = {}
    if kind in ("Adam", "AdamW"):
        _put(optimizer, name="adamw", learning_rate=params.number("lr"), epsilon=params.number("eps"))
        betas = params.take("betas")
        if isinstance(betas, list) and len(betas) == 2:
            _put(
                optimizer,
                **{key: value for key, value in zip(("beta1", "beta2"), betas, strict=True) if value != "auto"},
            )
        elif betas is not None:
            params.refuse("betas", betas, "give two numbers")
        params.expect("adam_w_mode", (True,), "AdamW's weight decay is decoupled; write true")
        params.expect("torch_adam", (True, False), "give true or false")
        params.expect("bias_correction", (True,), "AdamW corrects its moments; write true")
    elif kind == "SGD":
        _put(optimizer, name="sgd", learning_rate=params.number("lr"), momentum=params.number("momentum"))
    elif kind is not None:
        section.refuse(
            "type", kind, "set training.optimizer, one of adamw, rms_scaled_adamw, adafactor, sgd, and remove it"
        )
        return {}
    _put(optimizer, weight_decay=params.number("weight_decay"))
    params.finish()
    section.finish()
    return optimizer


def _schedule(section: Section) -> tuple[ConfigDict, float | None, int | None]:
    """training.schedule, the peak learning rate and training.steps, as far as they are said."""
    kind, params = section.word("type"), section.section("params")
    names = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    if kind not in names:
        if kind is not None:
            section.refuse("type", kind, "set training.schedule, and remove it")
        return {}, None, None
    schedule: ConfigDict = {"name": names[kind]}
    _put(schedule, warmup_steps=params.whole("warmup_num_steps"))
    if params.take("warmup_type") != "linear":
        params.refuse("warmup_type", "log", 'warm-up is linear here, and DeepSpeed\'s default is log; write "linear"')
    peak = steps = None
    if kind != "WarmupLR":
        steps = params.whole("total_num_steps")
    if kind == "WarmupCosineLR":
        _put(schedule, final_factor=params.number("cos_min_ratio"))
        params.expect("warmup_min_ratio", (0, 0.0), "warm-up begins at 0; write 0")
    else:
        peak = params.number("warmup_max_lr")
        params.expect("warmup_min_lr", (0, 0.0), "warm-up begins at 0; write 0")
    params.finish()
    section.finish()
    return schedule, peak, steps

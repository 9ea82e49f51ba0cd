"""What lies in the memory of a rank, found by looking at every tensor that is alive, and told apart by who holds it."""

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.config import from_mapping
from spade_t5.layers.head import TokenLossConfig
from spade_t5.layers.ssm import SSMMixer
from spade_t5.training import distributed
from spade_t5.training.averaging import WeightAverage
from spade_t5.training.config import TrainingConfig
from spade_t5.training.deepspeed import DeepSpeedBackend, start_processes

MODEL = {"vocab_size": 211, "num_layers": 2, "num_decoder_layers": 1, "global_layers": [0]}
"""Fields over those of `tiny`; sizes that no number of ranks divides."""


def model_fields(precision: str) -> dict[str, Any]:
    """The fields, with a state-space model that trains in part where it may."""
    return {**MODEL, "ssm_training": "frozen" if precision == "bf16" else "output"}


SMALL_BYTES = 4096
"""Counters, bucket tables and what else is of no size."""

SETTLING_LOOKS = 40

Storages = dict[int, int]
"""Address to bytes."""


def storages(tensors: Iterable[Tensor | None]) -> Storages:
    """Those behind some tensors, each once."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def all_storages() -> Storages:
    """Behind every tensor that there is."""
    return storages(all_tensors())


def all_tensors() -> list[Tensor | None]:
    """Every tensor that Python knows of, and the gradients that only PyTorch holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return [*tensors, *(tensor.grad for tensor in tensors if tensor.is_leaf)]


def measure(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bytes by holder at moments of a step, of one rank, for every training config."""
    start_processes()
    return [_measure(from_mapping(TrainingConfig, case)) for case in cases]


def _measure(config: TrainingConfig) -> dict[str, Any]:
    torch.manual_seed(0)
    model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", **model_fields(config.precision)))
    others = all_tensors()  # held until the end, so that none of their addresses is given to something new
    before = set(storages(others)) - set(storages(model.parameters()))
    backend = DeepSpeedBackend(model, config)
    average = None if config.ema_decay is None else WeightAverage(backend.fragments(), config.ema_decay)
    moments: dict[str, dict[str, int]] = {}

    def look(held: list[Tensor]) -> dict[str, int]:
        return _by_holder(backend, average, before, held)

    def look_when_settled() -> dict[str, int]:
        """A thread of the process group may hold what it has sent for a moment longer."""
        for _ in range(SETTLING_LOOKS):
            sizes = look([])
            if sizes["unknown"] < SMALL_BYTES:
                break
            time.sleep(0.05)
        return sizes

    accumulation = -(-config.global_batch_rows // (distributed.world_size() * config.micro_batch_rows))
    batch = {name: torch.full((config.micro_batch_rows, 12), 5) for name in ("input_ids", "labels")}
    for step in range(2):
        for i in range(accumulation):
            with backend.forward_context():
                loss = backend.model(**batch, use_cache=False, token_loss=TokenLossConfig()).loss
            is_last = step == 1 and i == accumulation - 1
            if is_last and backend._stage == 3:
                moments["forward"] = look([])
            if is_last:
                _watch_reduction(backend, lambda held: moments.setdefault("reduction", look(held)))
            backend.backward(loss)
            del loss
        if step == 1:
            moments["backward"] = look_when_settled()
        backend.step(1.0)
    moments["step"] = look_when_settled()
    del others
    return moments


def _watch_reduction(backend: DeepSpeedBackend, look: Callable[[list[Tensor]], Any]) -> None:
    """Looks at the memory whenever gradients are reduced; with the buffer that is made for it where there is no lasting one."""
    owner, name = backend._wrapped, "reduce_ipg_grads"
    if backend._stage == 3:
        name = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
    elif not hasattr(owner, name):
        owner, name = backend._engine, "flatten"
    original = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        if name == "flatten":
            buffer = original(*arguments, **options)
            look([buffer])
            return buffer
        look([])
        return original(*arguments, **options)

    setattr(owner, name, watched)


def _by_holder(
    backend: DeepSpeedBackend, average: WeightAverage | None, before: set[int], buffers: list[Tensor]
) -> dict[str, int]:
    """Bytes by holder; what several hold counts with the first."""
    model, optimizer, wrapped = backend.module, backend.optimizer, backend._wrapped
    parameters: list[Any] = list(model.parameters())  # DeepSpeed hangs attributes of its own on them
    pieces = [getattr(p, "ds_tensor", None) for p in parameters]
    is_whole = backend._stage == 3
    held: dict[str, Storages] = {}
    trained = [(p, piece) for p, piece in zip(parameters, pieces, strict=True) if p.requires_grad]
    frozen = [(p, piece) for p, piece in zip(parameters, pieces, strict=True) if not p.requires_grad]
    held["weights"] = storages(piece if is_whole else p for p, piece in trained)
    held["frozen"] = storages(piece if is_whole else p for p, piece in frozen)
    if is_whole:
        persistent = [p for p in parameters if p.ds_persist]
        held["persistent"] = storages(persistent)
        held["gathered"] = storages(p for p in parameters if not p.ds_persist and p.numel() == p.ds_numel)
        held["secondary"] = storages(p.ds_secondary_tensor for p in parameters)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if is_whole:
        stepped = list(wrapped.fp32_partitioned_groups_flat)
    held["master"] = storages(stepped)
    held["moments"] = storages(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    )
    held["average"] = storages([] if average is None else [copy for _, copy in average._pairs.values()])
    held["buckets"] = storages([*buffers, *_buckets(wrapped)])
    held["gradients"] = storages(_gradients(wrapped, parameters))
    caches = [
        thing
        for mixer in model.modules()
        if isinstance(mixer, SSMMixer)
        for thing in [*mixer._cache.kernels.values(), *(mixer._cache.spectrum or [])]
        if isinstance(thing, Tensor)
    ]
    held["other"] = storages([*backend._frozen.values(), *caches])
    counted: set[int] = set(before)
    sizes = {}
    for name, found in held.items():
        sizes[name] = sum(size for address, size in found.items() if address not in counted)
        counted |= set(found)
    sizes["unknown"] = sum(size for address, size in all_storages().items() if address not in counted)
    return sizes


def _buckets(wrapped: Any) -> list[Tensor]:
    buffers: list[Tensor] = []
    for bucket in getattr(wrapped, "ipg_buckets", {}).values():
        buffers += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    return buffers


def _gradients(wrapped: Any, parameters: list[Any]) -> list[Tensor | None]:
    found = [p.grad for p in parameters]
    for groups in (getattr(wrapped, "averaged_gradients", {}), getattr(wrapped, "all_grad_tensors", {})):
        for tensors in (groups or {}).values() if isinstance(groups, dict) else []:
            found += list(tensors or [])
    found += [getattr(wrapped, "grads_in_partition", None), getattr(wrapped, "grad_partitions_flat_buffer", None)]
    return found + list(getattr(wrapped, "fp32_groups_gradients_flat", []))

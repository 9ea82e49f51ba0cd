"""DeepSpeed: ZeRO 0-3 over all ranks. The only file that imports it.

Facts that shape the code (DeepSpeed 0.19): it averages gradients over ranks, so the engine's loss carries a factor world size; at stage 0 it
does not report the gradient norm, so clipping is done here; on a CPU its shared-memory collectives would compile C++ at start, so they are
switched off; its own checkpoints are not used (`spade_t5/checkpoint`), so this file also says where every fragment lies.
"""

import contextlib
import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spade_t5.errors import ConfigError
from spade_t5.training import distributed
from spade_t5.training.backend import (
    build_optimizer,
    clip_gradients,
    frozen_tensors,
    peak_rates,
    set_rates,
    share_fragments,
    unique_state,
    whole_fragments,
    whole_gradients,
)
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.data import BatchShape
from spade_t5.training.optimizers import Fragment


def deepspeed_json(config: TrainingConfig, deepspeed: DeepSpeedConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, derived from ours.

    Raises:
        ConfigError: groups of `hpz_partition_size` ranks do not make up all ranks.
    """
    if world_size % deepspeed.hpz_partition_size:
        raise ConfigError(
            f"training.deepspeed.hpz_partition_size: {deepspeed.hpz_partition_size} does not divide the {world_size} ranks; "
            "set it to the number of GPUs of a node, or to 1"
        )
    micro_batches = BatchShape(
        global_rows=config.global_batch_rows, micro_rows=config.micro_batch_rows, rank=0, world_size=world_size
    ).num_micro_batches
    zero: dict[str, Any] = {
        "stage": deepspeed.zero_stage,
        "reduce_bucket_size": deepspeed.bucket_numel,
        "allgather_bucket_size": deepspeed.bucket_numel,
        "stage3_param_persistence_threshold": deepspeed.persistence_threshold_numel,
    }
    if deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if deepspeed.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if deepspeed.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = deepspeed.hpz_partition_size
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.micro_batch_rows * micro_batches * world_size,
        "gradient_clipping": config.clip_norm if deepspeed.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if config.precision == "bf16_autocast":
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision == "bf16":
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def start_processes(timeout_seconds: float = distributed.DEFAULT_TIMEOUT_SECONDS) -> None:
    """Joins the process group that the launcher started; one process alone makes a group of one.

    Args:
        timeout_seconds: how long a collective waits for a rank before it fails.

    Raises:
        ConfigError: DeepSpeed is not installed, or the group is not of the launched size.
    """
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "training.deepspeed: DeepSpeed is not installed; install spade-t5[train], or set training.deepspeed=null to train in one process"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    distributed.join(timeout_seconds)
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed insists on
        dist.init_process_group(distributed.backend_name(), store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(distributed.device())
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    distributed.check_world_size()
    _count_waiting(deepspeed.comm.comm.cdb)


_COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


def _count_waiting(communicator: Any) -> None:
    """Has DeepSpeed's collectives wait in the engine's context.

    Its own logger of collectives would bring the device to a stop at each. All of them go through one object, whose methods are
    replaced here.
    """
    for name in _COLLECTIVES:
        collective = getattr(communicator, name)
        if not isinstance(collective, _Counted):
            setattr(communicator, name, _Counted(collective))


class _Counted:
    """A collective that waits in the engine's context; one that returns at once gives a handle that does."""

    def __init__(self, collective: Callable[..., Any]) -> None:
        self._collective = collective
        functools.update_wrapper(self, collective)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with distributed.waiting():
            work = self._collective(*arguments, **options)
        return work if work is None else _CountedWork(work)


class _CountedWork:
    """A collective under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        with distributed.waiting():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _count_fetches(coordinator: Any) -> None:
    """Has the model's stream wait in the engine's context for parameters that ZeRO 3 gathers.

    On a GPU the gathers run, and are waited for, on a stream of DeepSpeed's own. What the model's stream then waits for is that stream, at
    the end of `fetch_sub_module`, and nothing else is put into the model's stream meanwhile.
    """
    fetch = coordinator.fetch_sub_module

    @functools.wraps(fetch)
    def counted(*arguments: Any, **options: Any) -> Any:
        with distributed.waiting():
            return fetch(*arguments, **options)

    coordinator.fetch_sub_module = counted


class DeepSpeedBackend:
    """A model under `deepspeed.initialize`."""

    def __init__(self, module: nn.Module, config: TrainingConfig) -> None:
        """Wraps `module`, which must hold the same weights on every rank.

        Raises:
            ConfigError: state-space parameters would train in bf16.
            RuntimeError: ranks hold different weights, or DeepSpeed did not take the model.
        """
        import deepspeed

        assert config.deepspeed is not None
        self.module = module
        self._stage = config.deepspeed.zero_stage
        self._clip_norm = config.clip_norm
        self._check_equal_weights()
        # DeepSpeed hangs attributes of its own on parameters, hence Any.
        self._trained: list[tuple[str, Any]] = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._frozen = frozen_tensors(module)
        if config.precision == "bf16" and any(getattr(p, "_is_ssm", False) for _, p in self._trained):
            raise ConfigError(
                "training.precision: bf16 would round the state-space parameters that train; use bf16_autocast, or model.ssm_training=frozen"
            )
        client_optimizer = build_optimizer(module, config)
        self._peak_rates = peak_rates(client_optimizer)
        engine, wrapped, _, _ = deepspeed.initialize(
            model=module,
            optimizer=client_optimizer,
            config=deepspeed_json(config, config.deepspeed, distributed.world_size()),
            dist_init_required=False,
        )
        if not isinstance(engine, deepspeed.DeepSpeedEngine):
            raise RuntimeError(f"deepspeed.initialize returned a {type(engine).__name__}, not a DeepSpeedEngine")
        self.model: nn.Module = engine
        self._engine: Any = engine
        self._wrapped = wrapped
        if self._stage == 3 and distributed.device().type == "cuda":
            _count_fetches(wrapped.parameter_offload.get_param_coordinator())
        self.optimizer: torch.optim.Optimizer = client_optimizer if self._stage == 0 else wrapped.optimizer
        self._restore_frozen()
        if self._stage > 0:
            share_fragments(self.optimizer, self.fragments(), module)

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold different pieces of the optimizer state."""
        return self._stage > 0

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing: DeepSpeed's own forward sets the precision."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Adds the gradient of a micro-batch's share of the loss; DeepSpeed averages over ranks."""
        # Told each time, since steps differ in their number of micro-batches while the batch warms up; DeepSpeed would count to the largest.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()

    def step(self, learning_rate_factor: float) -> float:
        """Clips, updates and clears the gradients; returns their norm before clipping. Where it is not finite, nothing was updated."""
        set_rates(self.optimizer, self._peak_rates, learning_rate_factor)
        if self._stage == 0:
            parameters = [p for _, p in self._trained]
            norm = clip_gradients(parameters, self._clip_norm)
            if not math.isfinite(norm):
                for parameter in parameters:  # which makes the optimizer pass over it
                    parameter.grad = None
            self._engine.step()
            return norm
        self._engine.step()
        # ZeRO 1-3 look at the gradient themselves, and leave the weights as they are where it is not finite.
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def fragments(self) -> list[Fragment]:
        """The pieces of trained parameters in this rank's optimizer."""
        if self._stage == 0:
            return whole_fragments(self._trained)
        if self._stage == 3:
            return self._fragments_of_stage_3()
        result = []
        for name, p in self._trained:
            mapping = p._hp_mapping
            if mapping is not None:
                hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
                flat = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
                result.append(
                    Fragment(
                        name=name, offset=lp.start, numel=hp.numel, param_numel=p.numel(), flat=flat, start=hp.start
                    )
                )
        return result

    def _fragments_of_stage_3(self) -> list[Fragment]:
        result = []
        for name, p in self._trained:
            group, start, _ = self._wrapped.grad_position[self._wrapped.get_param_id(p)]
            partition_numel = p.ds_tensor.ds_numel
            offset = distributed.rank() * partition_numel
            numel = min(partition_numel, p.ds_numel - offset)
            if numel > 0:
                flat = self._wrapped.fp32_partitioned_groups_flat[group]
                result.append(
                    Fragment(name=name, offset=offset, numel=numel, param_numel=p.ds_numel, flat=flat, start=start)
                )
        return result

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Averaged gradients of the pieces in this rank's optimizer, where ZeRO keeps them between backward pass and step."""
        if self._stage == 0:
            yield from whole_gradients(self._trained)
            return
        for name, p in self._trained:
            if self._stage == 3:
                numel = min(p.ds_tensor.ds_numel, p.ds_numel - distributed.rank() * p.ds_tensor.ds_numel)
                if numel > 0:
                    yield name, self._wrapped.get_local_fp32_grad_for_param(p).view(-1)[:numel]
            elif p._hp_mapping is not None:
                address = p._hp_mapping.lp_fragment_address
                gradient = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).reshape(-1)
                # DeepSpeed's optimizer of bf16 parameters at stage 1 keeps whole gradients.
                is_whole = gradient.numel() == p.numel()
                yield name, gradient[address.start : address.start + address.numel] if is_whole else gradient

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters that do not train, as they were before ZeRO took them."""
        return self._frozen if distributed.is_main() else {}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts whole weights into the module; under ZeRO 3 into every rank's partition, by a broadcast from the main rank."""
        self._frozen = {name: weights[name].clone() for name in self._frozen}
        for name, tensor in unique_state(self.module):
            with self._whole(tensor), torch.no_grad():
                tensor.copy_(weights[name])

    def _restore_frozen(self) -> None:
        """Gives frozen parameters their fp32 values back: `bf16` casts them all, and a rounded transition is another state-space model."""
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                continue
            with self._whole(p), torch.no_grad():
                if not torch.equal(p, self._frozen[name].to(p.device)):
                    p.data = self._frozen[name].to(p.device)

    def _whole(self, parameter: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Context in which a parameter is whole and writable; under ZeRO 3 what the main rank writes is kept."""
        if not hasattr(parameter, "ds_id"):
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _check_equal_weights(self) -> None:
        """Compares a checksum of the initial weights over the ranks."""
        total = sum(float(tensor.detach().double().sum()) for _, tensor in unique_state(self.module))
        totals = distributed.gather_objects(total)
        if any(other != totals[0] for other in totals):
            raise RuntimeError(
                f"ranks start from different weights (sums {totals}); build the model with the same seed on each"
            )

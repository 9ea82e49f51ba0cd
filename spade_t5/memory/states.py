"""What a rank holds besides activations, in bytes: weights, gradients, optimizer, buffers of the reduction. Read from DeepSpeed 0.19 and true to it.

With P elements that train, n of them in an optimizer group, W ranks, A = n rounded up to a multiple of 2 W and S = A / W the piece of a rank,
d = 2 bytes in precision bf16 and 4 in the others, bytes a rank (a group at a time, then added up):

    stage                weights    master   moments    gradients at the update                          buffers
    none, 0              4 P        -        4 m P      4 P                                              4 x the largest bucket reduced
    1, 2                 d A        4 S      4 m S      4 x the parameters that touch the piece, whole   4 bucket_numel
    1 in bf16            d A        4 S      4 m S      4 A always, and 2 P behind the backward pass     4 A where there are several groups
    2 in bf16            d A        4 S      4 m S      4 S                                              2 bucket_numel
    3                    d R        4 R      4 m R      4 R always                                       d bucket_numel always

m is the number of moments (2 for AdamW). At stage 3 pieces are cut parameter by parameter, R = sum of n_p / W rounded up, parameters of at most
`persistence_threshold_numel` elements are also held whole. While backward passes run,
whole gradients, 4 P, are held at stage 1, and where steps accumulate, those of the piece twice at stage 2 (not bf16). At stage 3 the parameters
of layers that run are gathered, all of them as long as they stay within DeepSpeed's 10^9 elements.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from spade_t5.memory.parameters import Parameter, Parameters, total
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.optimizers import AdafactorConfig, OptimizerConfig, SGDConfig

FLOAT_BYTES, HALF_BYTES = 4, 2

_ALLREDUCE_NUMEL = 500_000_000  # DeepSpeed's bucket where it reduces whole gradients
_GATHERED_NUMEL = 1_000_000_000  # its max_live_parameters and max_reuse_distance
_PREFETCH_NUMEL = 50_000_000  # its stage3_prefetch_bucket_size


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStates:
    """Bytes on one rank's device, and in its host memory."""

    weights: int
    """Parameters that train, as the model computes with them."""
    frozen: int
    """Parameters that do not, in float32."""
    master: int
    """float32 copies that the optimizer steps."""
    moments: int
    """Of the optimizer."""
    average: int
    """Moving average of the weights."""
    gradients: int
    """Between the last backward pass and the update."""
    accumulated: int
    """Gradients held besides while micro-batches are run: those of earlier ones, or bf16 ones on their way to float32."""
    buckets: int
    """Buffers in which gradients are reduced, while a backward pass runs."""
    persistent: int
    """ZeRO 3: small parameters, whole besides their shards."""
    secondary: int
    """ZeRO 3, hierarchical: the second copy within a group of ranks."""
    gathered: int
    """ZeRO 3: parameters of the layers that run, at most."""
    update: int
    """In the update: gradients made one piece, and the optimizer's intermediate results."""
    host: int
    """What is offloaded."""

    @property
    def resident(self) -> int:
        """What lies on the device from the first step to the last."""
        return self.weights + self.frozen + self.master + self.moments + self.average + self.persistent + self.secondary

    @property
    def backward_peak(self) -> int:
        """The most on the device while micro-batches run, besides activations."""
        return self.resident + self.gradients + self.accumulated + self.buckets + self.gathered

    @property
    def update_peak(self) -> int:
        """The most on the device in the update, when activations are gone."""
        return self.resident + self.gradients + self.update

    def largest(self, activations: int) -> int:
        """The most that a step takes on the device: in a backward pass, or in the update."""
        return max(self.backward_peak + activations, self.update_peak)


def rank_states(config: TrainingConfig, parameters: Parameters, *, world_size: int, rank: int = 0) -> RankStates:
    """What one rank of a run holds.

    Args:
        config: of the run.
        parameters: of its model.
        world_size: W; 1 without DeepSpeed.
        rank: pieces are of one size but at stages 1 and 2, where gradients are kept by whole parameters.
    """
    if config.deepspeed is None or config.deepspeed.zero_stage == 0:
        states = _whole(config, parameters)
    elif config.deepspeed.zero_stage == 3:
        states = _partitioned(config, config.deepspeed, parameters, world_size)
    else:
        states = _flat(config, config.deepspeed, parameters, world_size, rank)
    return states


def num_micro_batches(config: TrainingConfig, world_size: int) -> int:
    """Micro-batches of each rank in a full step."""
    return -(-config.global_batch_rows // (world_size * config.micro_batch_rows))


def largest_rank(config: TrainingConfig, parameters: Parameters, *, world_size: int) -> RankStates:
    """The rank that holds most; of many ranks, at stages 1 and 2, some are looked at."""
    ranks = range(world_size) if world_size <= 16 else [k * (world_size - 1) // 15 for k in range(16)]
    found = [rank_states(config, parameters, world_size=world_size, rank=rank) for rank in ranks]
    return max(found, key=lambda states: states.largest(0))


def _whole(config: TrainingConfig, parameters: Parameters) -> RankStates:
    """Everything on every rank."""
    trained, frozen = FLOAT_BYTES * parameters.trained, FLOAT_BYTES * parameters.frozen
    tensors = [one for group in parameters.groups for one in group]
    in_order = [one for one in parameters.of_model if one.is_trained]
    largest = max((one.numel for one in in_order), default=0)
    return _states(
        weights=trained,
        frozen=frozen,
        moments=FLOAT_BYTES * sum(_moment_numel(config.optimizer, one.shape) for one in tensors),
        average=trained if config.ema_decay is not None else 0,
        gradients=trained,
        buckets=0 if config.deepspeed is None else FLOAT_BYTES * _largest_bucket([one.numel for one in in_order]),
        update=2 * FLOAT_BYTES * largest,
    )


def _flat(
    config: TrainingConfig, deepspeed: DeepSpeedConfig, parameters: Parameters, world_size: int, rank: int
) -> RankStates:
    """Stages 1 and 2: parameters are views of one flat tensor a group, of which each rank steps a piece."""
    is_half = config.precision == "bf16"
    accumulates = num_micro_batches(config, world_size) > 1
    whole = [_rounded_up(total(group), 2 * world_size) for group in parameters.groups]
    pieces = [numel // world_size for numel in whole]
    owned = FLOAT_BYTES * sum(pieces)
    touched = sum(_touched(group, piece, rank) for group, piece in zip(parameters.groups, pieces, strict=True))
    accumulated, buckets = 0, FLOAT_BYTES * deepspeed.bucket_numel
    if is_half and deepspeed.zero_stage == 1:
        gradients, accumulated = FLOAT_BYTES * sum(whole), HALF_BYTES * parameters.trained
        buckets = FLOAT_BYTES * _largest_bucket(whole, copies_single=False)
    elif is_half:
        gradients, buckets = owned, HALF_BYTES * deepspeed.bucket_numel
    else:
        gradients = FLOAT_BYTES * touched
        if deepspeed.zero_stage == 1:  # which reduces nothing before the last backward pass is through
            accumulated = FLOAT_BYTES * parameters.trained - gradients
        elif accumulates:
            accumulated = gradients
    moments = _num_moments(config.optimizer) * owned
    states = {
        "weights": (HALF_BYTES if is_half else FLOAT_BYTES) * sum(whole),
        "frozen": FLOAT_BYTES * parameters.frozen,
        "gradients": gradients,
        "accumulated": max(accumulated, 0),
        "buckets": buckets,
    }
    average = owned if config.ema_decay is not None else 0
    if deepspeed.offload_optimizer:
        # Gradients of the piece go to the host as they are reduced, through one buffer on either side.
        element = HALF_BYTES if is_half else FLOAT_BYTES
        buffer = element * max(one.numel for group in parameters.groups for one in group)
        kept = owned if accumulates else 0
        host = owned + moments + average + owned + kept + element * sum(pieces) + buffer
        return _states(**{**states, "gradients": 0, "accumulated": 0, "buckets": buckets + buffer}, host=host)
    return _states(**states, master=owned, moments=moments, average=average, update=3 * FLOAT_BYTES * max(pieces))


def _partitioned(
    config: TrainingConfig, deepspeed: DeepSpeedConfig, parameters: Parameters, world_size: int
) -> RankStates:
    """Stage 3: every parameter is cut into as many pieces as there are ranks."""
    element = HALF_BYTES if config.precision == "bf16" else FLOAT_BYTES
    trained = [one for one in parameters.of_model if one.is_trained]
    frozen = [one for one in parameters.of_model if not one.is_trained]
    owned = FLOAT_BYTES * _cut(trained, world_size)
    groups = [FLOAT_BYTES * _cut(group, world_size) for group in parameters.groups]
    small = [one for one in parameters.of_model if one.numel <= deepspeed.persistence_threshold_numel]
    large = [one for one in parameters.of_model if one.numel > deepspeed.persistence_threshold_numel]
    gathered = min(_bytes(large, element), element * (_GATHERED_NUMEL + _PREFETCH_NUMEL))
    weights = element * _cut(trained, world_size)
    moments = _num_moments(config.optimizer) * owned
    master = owned
    average = owned if config.ema_decay is not None else 0
    secondary = 0
    if deepspeed.hpz_partition_size > 1:
        secondary = element * sum(
            _aligned(one, world_size) // deepspeed.hpz_partition_size for one in parameters.of_model
        )
    states = {
        "weights": weights,
        "frozen": FLOAT_BYTES * _cut(frozen, world_size),
        "buckets": element * deepspeed.bucket_numel,
        "persistent": _bytes(small, element),
        "secondary": secondary,
        "gathered": gathered,
    }
    host = 0
    if deepspeed.offload_parameters:
        host += weights
        states["weights"] = 0
    if deepspeed.offload_optimizer:
        return _states(**states, host=host + master + moments + average + owned)
    update = 3 * max(groups, default=0)
    return _states(**states, master=master, moments=moments, average=average, gradients=owned, update=update, host=host)


def _states(**values: int) -> RankStates:
    return RankStates(**{field.name: values.get(field.name, 0) for field in fields(RankStates)})


def _num_moments(optimizer: OptimizerConfig) -> int:
    """Tensors that the optimizer keeps of the shape of what it steps."""
    return 0 if isinstance(optimizer, SGDConfig) and optimizer.momentum == 0.0 else optimizer.num_moments


def _moment_numel(optimizer: OptimizerConfig, shape: tuple[int, ...]) -> int:
    """Elements of the optimizer's state of one whole parameter."""
    numel = math.prod(shape)
    if not isinstance(optimizer, AdafactorConfig):
        return _num_moments(optimizer) * numel
    return numel if len(shape) < 2 else numel // shape[-1] + numel // shape[-2]


def _touched(group: Sequence[Parameter], piece: int, rank: int) -> int:
    """Elements that a rank keeps of a group's gradients: parameters that touch its piece, whole, and what fills the piece up."""
    first, end = rank * piece, (rank + 1) * piece
    touching = [(begin, one.numel) for begin, one in _placed(group) if begin < end and begin + one.numel > first]
    covered = sum(min(begin + numel, end) - max(begin, first) for begin, numel in touching)
    return sum(numel for _, numel in touching) + piece - covered


def _placed(group: Sequence[Parameter]) -> Iterator[tuple[int, Parameter]]:
    """Parameters with the place where each begins in the flat tensor."""
    begin = 0
    for one in group:
        yield begin, one
        begin += one.numel


def _largest_bucket(numels: Sequence[int], *, copies_single: bool = True) -> int:
    """Elements of the largest bucket of gradients that are reduced together, whole ones one after the other until it is full."""
    largest, bucket = 0, []
    for i, numel in enumerate(numels):
        bucket.append(numel)
        if sum(bucket) > _ALLREDUCE_NUMEL or i == len(numels) - 1:
            largest = max(largest, sum(bucket) if copies_single or len(bucket) > 1 else 0)
            bucket = []
    return largest


def _bytes(parameters: Sequence[Parameter], element: int) -> int:
    """Of whole parameters; those that do not train are in float32."""
    return sum((element if one.is_trained else FLOAT_BYTES) * one.numel for one in parameters)


def _cut(parameters: Sequence[Parameter], world_size: int) -> int:
    """Elements of one rank's pieces."""
    return sum(_aligned(one, world_size) // world_size for one in parameters)


def _aligned(parameter: Parameter, world_size: int) -> int:
    return _rounded_up(parameter.numel, world_size)


def _rounded_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple

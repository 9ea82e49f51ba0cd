"""What the ranks exchange in one optimizer step: which collectives, how often, how many bytes. Arithmetic only, nothing is sent.

Read off DeepSpeed 0.19's source under the configuration that `deepspeed_json` makes, and compared by the tests with the calls that real
ranks make. Left out: the first steps of a run, in which ZeRO 3 records in what order modules run, and those with a smaller batch; steps that
are logged, or behind which something is saved, evaluated or compared; skipped steps; optimizers that need whole parameters under ZeRO and
add sums of their own.

ZeRO: arXiv:1910.02054. Every stage sums gradients once per step (ZeRO 2 and 3: once per micro-batch); ZeRO 1 and 2 gather the updated
weights once per step, ZeRO 3 gathers them anew in every micro-batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import nn

from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.optimizers import parameter_groups
from spade_t5.training.samples import NUM_PARTS
from spade_t5.training.throughput import Work

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
Purpose = Literal["gradients", "weights", "numbers"]
Phase = Literal["forward", "backward", "update"]

_FLOAT64_BYTES = 8
AGREED_NUMBERS = 3 + len(Work._fields) + NUM_PARTS
"""Float64 numbers that ranks add up before a step: three flags, the step's work, and parts of the samples' digest."""
# Defaults of DeepSpeed that `deepspeed_json` leaves alone.
_UNSHARDED_BUCKET_NUMEL = 500_000_000
_PREFETCH_NUMEL = 50_000_000
_REUSE_NUMEL = 1_000_000_000
_LIVE_NUMEL = 1_000_000_000


class Weight(NamedTuple):
    """One parameter, tied ones counted once."""

    numel: int
    """Number of elements."""
    group: int | None
    """Its parameter group in the optimizer; None where it does not train."""


class Block(NamedTuple):
    """A module, as ZeRO 3 sees it: it fetches parameters when a module begins and may release them when it ends."""

    own: tuple[int, ...]
    """Places of the module's own parameters in `ModelWeights.weights`."""
    children: tuple["Block", ...]
    """Modules inside, in the order in which they run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    """What of a model matters to communication."""

    weights: tuple[Weight, ...]
    """All parameters in the order of their registration."""
    root: Block
    """The model."""

    @property
    def num_trained(self) -> int:
        """Number of elements that train."""
        return sum(weight.numel for weight in self.weights if weight.group is not None)

    @property
    def group_numels(self) -> list[int]:
        """Number of elements in each parameter group."""
        groups = {weight.group for weight in self.weights} - {None}
        return [sum(weight.numel for weight in self.weights if weight.group == group) for group in sorted(groups)]  # type: ignore[type-var]


class Traffic(NamedTuple):
    """Collectives of one kind in one step."""

    kind: Kind
    purpose: Purpose
    phase: Phase
    num_ranks: int
    """Size of the group: all ranks, or with hierarchical ZeRO 3 those of a node."""
    calls: int
    """How many there are."""
    nbytes: int
    """Bytes of all of them: of the buffers that a rank gives to an all-reduce or reduce-scatter, or has after an all-gather."""
    is_overlapped: bool = False
    """Whether it can go on while the GPU computes; on a CPU none does but the gathering of what is needed later."""


def describe(model: nn.Module) -> ModelWeights:
    """The weights of a model, which may be on the meta device, before DeepSpeed has taken it."""
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, ssm_learning_rate=None)
    group_of = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
    parameters = list(model.parameters())
    places = {id(parameter): place for place, parameter in enumerate(parameters)}

    def block(module: nn.Module) -> Block:
        own = tuple(places[id(parameter)] for parameter in module.parameters(recurse=False))
        return Block(own, tuple(block(child) for child in _called(module)))

    weights = tuple(Weight(parameter.numel(), group_of.get(id(parameter))) for parameter in parameters)
    return ModelWeights(weights=weights, root=block(model))


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Modules inside that are called; a list is not, what is in it is."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _called(child)
        else:
            yield child


def step_traffic(
    model: ModelWeights,
    config: TrainingConfig,
    deepspeed: DeepSpeedConfig,
    *,
    world_size: int,
    num_loss_groups: int = 0,
) -> list[Traffic]:
    """All that a rank takes part in during one optimizer step.

    With trained weights of P elements of b bytes each (4, in the precision `bf16` 2) and m micro-batches, buffers padded to whole shares:

        stage 0   all-reduce P b                                          ZeRO 2   m all-reduces of P b, all-gather P b
        ZeRO 1    all-reduce P b, all-gather P b                          ZeRO 3   m (reduce-scatter P b, all-gather of all weights)

    Args:
        model: its weights.
        config: how it is trained; the batch must be that of a step.
        deepspeed: its `deepspeed`.
        world_size: number of ranks; one rank exchanges nothing.
        num_loss_groups: labels of the objective's groups, whose losses are added up too.

    Returns:
        one entry for each purpose and phase, in the order in which they come.
    """
    if world_size == 1:
        return []
    micro_batches = -(-config.global_batch_rows // (world_size * config.micro_batch_rows))
    numbers = [
        Traffic("all_reduce", "numbers", "update", world_size, 1, AGREED_NUMBERS * _FLOAT64_BYTES),
        Traffic("all_reduce", "numbers", "update", world_size, 1, (1 + 2 * num_loss_groups) * _FLOAT64_BYTES),
    ]
    if deepspeed.zero_stage == 3:
        exchange = _stage_3(model, config, deepspeed, world_size, micro_batches)
    else:
        exchange = _stages_0_to_2(model, config, deepspeed, world_size, micro_batches)
    return [*numbers, *exchange]


def _element_bytes(config: TrainingConfig) -> int:
    """Bytes of an element of a trained weight, and of its gradient on the way."""
    return 2 if config.precision == "bf16" else 4


def _stages_0_to_2(
    model: ModelWeights, config: TrainingConfig, deepspeed: DeepSpeedConfig, world_size: int, micro_batches: int
) -> Iterator[Traffic]:
    """Whole weights on every rank. Sums of gradients are all-reduces of buckets, also where a rank keeps only its own share."""
    stage, element_bytes = deepspeed.zero_stage, _element_bytes(config)
    trained = [weight for weight in model.weights if weight.group is not None]
    # DeepSpeed has another optimizer for bf16 at ZeRO 1, which reduces as stage 0 does and takes the norm from whole gradients.
    reduces_as_stage_0 = stage == 0 or (stage == 1 and config.precision == "bf16")
    # Shares begin at multiples of two elements.
    padded = [_round_up(numel, 2 * world_size) for numel in model.group_numels]
    if reduces_as_stage_0:
        buckets = _filled([weight.numel for weight in trained] if stage == 0 else padded, _UNSHARDED_BUCKET_NUMEL)
    elif stage == 1:
        by_group = sorted(trained, key=lambda weight: weight.group or 0)
        buckets = _packed([weight.numel for weight in by_group], deepspeed.bucket_numel)
    else:
        buckets = _packed([weight.numel for weight in reversed(trained)], deepspeed.bucket_numel)
    times = micro_batches if stage == 2 else 1
    yield Traffic(
        "all_reduce", "gradients", "backward", world_size, times * len(buckets), times * sum(buckets) * element_bytes
    )
    if stage == 0:
        return
    if not reduces_as_stage_0:
        yield Traffic(
            "all_reduce", "numbers", "update", world_size, len(padded), len(padded) * 4
        )  # the gradient's norm
        if config.precision == "bf16":
            yield Traffic("all_reduce", "numbers", "update", world_size, 1, 1)  # whether a gradient overflowed
    yield Traffic("all_gather", "weights", "update", world_size, len(padded), sum(padded) * element_bytes)


def _stage_3(
    model: ModelWeights, config: TrainingConfig, deepspeed: DeepSpeedConfig, world_size: int, micro_batches: int
) -> Iterator[Traffic]:
    """Every rank holds a share of each weight; the small ones whole, which are gathered once they were updated."""
    element_bytes = _element_bytes(config)

    def padded_bytes(weight: Weight) -> int:
        # What does not train keeps its fp32 values, so that the state-space transition is not rounded.
        return _round_up(weight.numel, world_size) * (element_bytes if weight.group is not None else 4)

    # A second copy within a node comes from gathering a weight, and serves until the weight is updated: what does not train always has one.
    node_ranks = deepspeed.hpz_partition_size
    threshold = deepspeed.persistence_threshold_numel
    first = _gathers(model, threshold, "none" if node_ranks == 1 else "frozen")
    others = _gathers(model, threshold, "none" if node_ranks == 1 else "all")
    traffic: dict[tuple[Phase, int], Traffic] = {}
    for times, gathers in ((1, first), (micro_batches - 1, others)):
        for gather in gathers:
            weights = [model.weights[place] for place in gather.places]
            # What is gathered together has one type.
            calls = len({weight.group is None for weight in weights}) if element_bytes == 2 else 1
            num_ranks = node_ranks if gather.is_second else world_size
            key = (gather.phase, num_ranks)
            before = traffic.get(key, Traffic("all_gather", "weights", gather.phase, num_ranks, 0, 0, True))
            nbytes = before.nbytes + times * sum(map(padded_bytes, weights))
            traffic[key] = before._replace(calls=before.calls + times * calls, nbytes=nbytes)
    yield from (one for one in traffic.values() if one.calls)
    trained = [weight for weight in model.weights if weight.group is not None]
    buckets = _packed([weight.numel for weight in reversed(trained)], deepspeed.bucket_numel)
    scattered = sum(_round_up(weight.numel, world_size) for weight in trained) * element_bytes
    yield Traffic(
        "reduce_scatter",
        "gradients",
        "backward",
        world_size,
        micro_batches * len(buckets),
        micro_batches * scattered,
        True,
    )
    num_groups = len(model.group_numels)
    yield Traffic(
        "all_reduce", "numbers", "update", world_size, num_groups, num_groups * _FLOAT64_BYTES
    )  # the gradient's norm
    small = [weight for weight in model.weights if weight.numel <= deepspeed.persistence_threshold_numel]
    if small:
        yield Traffic("all_gather", "weights", "update", world_size, len(small), sum(map(padded_bytes, small)))


@lru_cache(maxsize=16)
def _gathers(
    model: ModelWeights, persistence_threshold_numel: int, seconds: Literal["none", "frozen", "all"]
) -> list["_Gather"]:
    """What a micro-batch gathers where these weights have a second copy within the node; does not depend on the number of ranks."""
    places: set[int] | None = None
    if seconds != "none":
        weights = enumerate(model.weights)
        places = {place for place, weight in weights if seconds == "all" or weight.group is None}
    return _Fetching(model, persistence_threshold_numel, places).run()


class _Gather(NamedTuple):
    """Weights that are gathered together."""

    phase: Phase
    places: list[int]
    is_second: bool
    """Whether from the copies within a node."""


class _Fetching:
    """Which weights ZeRO 3 gathers together during one micro-batch, and when; follows DeepSpeed's `PartitionedParameterCoordinator`.

    When a module begins, what it needs and has not yet is gathered, and then what comes next in the order of the pass before, up to 50
    million elements more, as long as no more than 10^9 are whole. When it ends, its weights are given back unless they are used again within
    10^9 elements. So a model below half that size gathers each weight once in a micro-batch, a larger one some of them again for the
    backward pass.

    Args:
        model: the weights.
        persistence_threshold_numel: weights of at most so many elements are whole already.
        seconds: weights that have a second copy within the node to begin with; None: none ever gets one.
    """

    def __init__(self, model: ModelWeights, persistence_threshold_numel: int, seconds: set[int] | None) -> None:
        self._numels = [weight.numel for weight in model.weights]
        self._small = {place for place, numel in enumerate(self._numels) if numel <= persistence_threshold_numel}
        self._events = {"forward": list(_forward(model.root)), "backward": list(_backward(model.root))}
        begun = [event.block.own for events in self._events.values() for event in events if event.is_begin]
        self._modules = begun
        self._module_numels = [sum(self._numels[place] for place in own) for own in begun]
        self._queue = deque((place, step) for step, own in enumerate(begun) for place in sorted(set(own)))
        self._fetched_for = dict.fromkeys(range(len(self._numels)), -1)
        self._whole = set(self._small)
        self._whole_numel = 0
        self._seconds = None if seconds is None else set(seconds)
        self._step = 0

    def run(self) -> list[_Gather]:
        """Follows one micro-batch."""
        gathers = []
        for phase, events in self._events.items():
            for event in events:
                if not event.is_begin:
                    self._release(event.block.own)
                    continue
                for places in self._fetch(set(event.block.own)):
                    seconds = self._seconds or set()
                    for is_second in (True, False):
                        batch = sorted(place for place in places if (place in seconds) == is_second)
                        if batch:
                            gathers.append(_Gather(phase, batch, is_second))  # type: ignore[arg-type]
                self._step += 1
        return gathers

    def _fetch(self, needed: set[int]) -> Iterator[list[int]]:
        yield self._gather(needed)
        unmet = {place for place in needed if self._fetched_for[place] < self._step}
        met: set[int] = set()
        while self._queue and len(met) < len(unmet):
            place, self._fetched_for[place] = self._queue.popleft()
            met.add(place)
        limit = min(_LIVE_NUMEL - self._whole_numel, _PREFETCH_NUMEL)
        ahead: set[int] = set()
        numel = 0
        while self._queue and numel < limit:
            place, step = self._queue.popleft()
            self._fetched_for[place] = max(self._fetched_for[place], step)
            if place not in self._whole and place not in ahead:
                ahead.add(place)
                numel += self._numels[place]
        yield self._gather(ahead)

    def _gather(self, places: set[int]) -> list[int]:
        missing = [place for place in places if place not in self._whole]
        self._whole.update(missing)
        self._whole_numel += sum(self._numels[place] for place in missing)
        return missing

    def _release(self, own: Sequence[int]) -> None:
        going = {place for place in own if place not in self._small and self._fetched_for[place] <= self._step}
        distance = 0
        for step in range(self._step, len(self._modules)):
            if not going or distance >= _REUSE_NUMEL:
                break
            going.difference_update(self._modules[step])
            distance += self._module_numels[step]
        going &= self._whole
        self._whole -= going
        self._whole_numel -= sum(self._numels[place] for place in going)
        if self._seconds is not None:
            self._seconds |= going


class _Event(NamedTuple):
    """A module begins or ends."""

    block: Block
    is_begin: bool


def _forward(block: Block) -> Iterator[_Event]:
    yield _Event(block, True)
    for child in block.children:
        yield from _forward(child)
    yield _Event(block, False)


def _backward(block: Block) -> Iterator[_Event]:
    yield _Event(block, True)
    for child in reversed(block.children):
        yield from _backward(child)
    yield _Event(block, False)


def _packed(numels: Iterable[int], bucket_numel: int) -> list[int]:
    """Sizes of buckets that are sent off before they would overflow.

    >>> _packed([3, 3, 3, 9, 1], 6)
    [6, 3, 9, 1]
    """
    buckets: list[int] = []
    for numel in numels:
        if buckets and buckets[-1] + numel <= bucket_numel:
            buckets[-1] += numel
        else:
            buckets.append(numel)
    return buckets


def _filled(numels: Iterable[int], bucket_numel: int) -> list[int]:
    """Sizes of buckets that are sent off once they have overflown.

    >>> _filled([3, 3, 3, 9, 1], 6)
    [9, 9, 1]
    """
    buckets = [0]
    for numel in numels:
        if buckets[-1] > bucket_numel:
            buckets.append(0)
        buckets[-1] += numel
    return buckets


def _round_up(numel: int, unit: int) -> int:
    return -(-numel // unit) * unit

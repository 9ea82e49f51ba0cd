"""What a run would take of given machines: parameters, memory of every rank, FLOPs, time, cost, checkpoints. Arithmetic and a trace, no GPU.

The equations are in `spade_t5.flops` and `spade_t5.memory`; here they meet a config, a number of GPUs and what is assumed of them, and become
lines of text. What is assumed rather than counted is marked as such.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spade_t5.checkpoint import checkpoint_bytes
from spade_t5.configuration import SpadeT5Config
from spade_t5.devices import Accelerator
from spade_t5.errors import ConfigError
from spade_t5.flops import BatchLayout
from spade_t5.flops.model import model_flops
from spade_t5.memory.activations import Activations, Workload, trace_activations
from spade_t5.memory.parameters import Parameters
from spade_t5.memory.states import FLOAT_BYTES, RankStates, largest_rank, num_micro_batches
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.training.communication import ModelWeights, describe
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.deepspeed import deepspeed_json
from spade_t5.training.optimizers import check_zero_stage
from spade_t5.training.scaling import Link, Network, StepTime, gpu_network, predict_nodes, predict_step

GIB = 1 << 30
RESERVE_BYTES, RESERVE_SHARE = 2 * GIB, 0.05
"""Memory that is left to the driver, the communication library and gaps between blocks: an assumption."""

LINK_SHARE = 0.8
"""Share of a link's published bandwidth that collectives are assumed to reach."""
PCIE_BYTES_PER_SECOND = 25e9
"""Assumed of devices without links of their own."""
SCALING_NODES = (1, 2, 4, 8, 16, 32, 64)

PRECISIONS = ("fp32", "bf16_autocast", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """What the run is planned for."""

    accelerator: Accelerator
    """Kind of GPU."""
    gpus: int
    """On all nodes together."""
    nodes: int
    """Nodes, with equally many GPUs."""
    mfu: float
    """Assumed share of the peak that model FLOPs reach."""
    price: float
    """Assumed price of a GPU for an hour."""
    disk_gbps: float
    """Assumed gigabytes a second that all nodes together write to the run folder."""
    within: Link | None
    """Assumed link of a GPU to the next of its node; None: a share of what its maker publishes."""
    between: Link
    """Assumed link of a node to the next: what all its network cards send together."""

    @property
    def usable_bytes(self) -> int:
        """Memory of a GPU without the reserve."""
        return int(self.accelerator.memory_bytes * (1 - RESERVE_SHARE)) - RESERVE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What the rows of a step hold."""

    inputs_length: int
    """Positions of a row's inputs."""
    targets_length: int
    """Of its targets."""
    kinds: Sequence[tuple[float, int, int]]
    """Share of the rows, inputs and targets that they hold."""


def resource_lines(
    config: TrainingConfig, model_config: SpadeT5Config, rows: Rows, machines: Machines
) -> Iterator[str]:
    """The plan of a run, line by line.

    Raises:
        ConfigError: the run would not start on these machines, or its memory does not suffice.
    """
    _check(config, model_config, machines)
    with torch.device("meta"):
        model = SpadeT5ForConditionalGeneration(model_config)
    parameters = Parameters.of(model)
    yield f"machines   {_count(machines.gpus, 'GPU')} {machines.accelerator.name} on {_count(machines.nodes, 'node')}, {_gib(machines.accelerator.memory_bytes)} each"
    yield from _parameter_lines(parameters)
    clock = _Clock(config, machines, row_flops(model_config, rows), describe(model))
    yield from _time_lines(config, rows, machines, clock)
    yield from _scaling_lines(config, machines, clock)
    yield from _checkpoint_lines(config, model, parameters, machines)
    yield ""
    traced = {precision: _activations(config, model_config, rows, precision, machines) for precision in PRECISIONS}
    yield f"memory     bytes of the fullest rank, {config.micro_batch_rows} rows at once, gradient_checkpointing={config.recomputation}; * is this run"
    yield from _table(config, parameters, machines, traced)
    doubled = dataclasses.replace(config, micro_batch_rows=2 * config.micro_batch_rows)
    twice = _activations(doubled, model_config, rows, config.precision, machines)
    yield from _verdict(config, parameters, machines, traced[config.precision], twice)


def _check(config: TrainingConfig, model_config: SpadeT5Config, machines: Machines) -> None:
    """What a start would refuse."""
    if machines.gpus % machines.nodes:
        raise ConfigError(f"--gpus: {machines.gpus} GPUs cannot be shared out evenly over {machines.nodes} nodes")
    if config.deepspeed is None:
        if machines.gpus > 1:
            raise ConfigError(
                f"training.deepspeed: null trains in one process, but --gpus is {machines.gpus}; set training.deepspeed.zero_stage=1"
            )
        return
    deepspeed_json(config, config.deepspeed, machines.gpus)
    check_zero_stage(config.optimizer, config.deepspeed.zero_stage)
    if config.precision == "bf16" and model_config.global_layers and model_config.ssm_training != "frozen":
        raise ConfigError(
            "training.precision: bf16 would round the state-space parameters that train; use bf16_autocast, or model.ssm_training=frozen"
        )


def _parameter_lines(parameters: Parameters) -> Iterator[str]:
    yield f"parameters {parameters.trained + parameters.frozen:,}: {parameters.trained:,} train, {parameters.frozen:,} are frozen"
    for part, (trained, frozen) in parameters.by_part().items():
        yield f"           {part} {trained + frozen:,}" + (f", frozen {frozen:,}" if frozen else "")


def row_flops(model_config: SpadeT5Config, rows: Rows) -> float:
    """Model FLOPs of a mean row, forward and backward, as if it were one document."""
    return sum(
        share * model_flops(model_config, _layout(rows, inputs, targets), has_decoder=True)
        for share, inputs, targets in rows.kinds
    )


def _layout(rows: Rows, inputs: int, targets: int) -> BatchLayout:
    return BatchLayout(
        rows=1,
        inputs_length=rows.inputs_length,
        targets_length=rows.targets_length,
        input_tokens=np.array([inputs]),
        target_tokens=np.array([targets]),
        labelled=targets,
        label_columns=1,
        segment_ids=None,
        decoder_segment_ids=None,
    )


@dataclass(frozen=True, slots=True)
class _Clock:
    """How long steps take: the arithmetic of every row that a rank runs, empty ones too, and what of communication that does not hide."""

    config: TrainingConfig
    """Of the run."""
    machines: Machines
    """That it is planned for."""
    row_flops: float
    """Model FLOPs of a mean row."""
    weights: ModelWeights
    """What ranks exchange."""

    @property
    def network(self) -> Network:
        """What connects the GPUs."""
        machines = self.machines
        within = machines.within or _published_link(machines.accelerator)
        return gpu_network(node_ranks=machines.gpus // machines.nodes, within=within, between=machines.between)

    def step(self, global_rows: int) -> StepTime:
        """A step of so many rows of all ranks."""
        config = dataclasses.replace(self.config, global_batch_rows=global_rows, batch_warmup=None)
        return predict_step(
            self.weights,
            config,
            config.deepspeed or DeepSpeedConfig(),  # without it there is one process, which exchanges nothing
            self.network,
            world_size=self.machines.gpus,
            compute_seconds=self.compute_seconds(num_micro_batches(config, self.machines.gpus)),
        )

    def compute_seconds(self, micro_batches: int) -> float:
        """Arithmetic of a rank."""
        speed = self.machines.accelerator.peak_flops(self.config.precision) * self.machines.mfu
        return micro_batches * self.config.micro_batch_rows * self.row_flops / speed

    def run_seconds(self) -> float:
        """All steps, also those of a batch that still grows."""
        # Steps with as many micro-batches take as long.
        unit = self.machines.gpus * self.config.micro_batch_rows
        num_steps = Counter(-(-self.config.step_rows.of(step) // unit) for step in range(1, self._num_warm + 1))
        seconds = sum(count * self.step(micro_batches * unit).seconds for micro_batches, count in num_steps.items())
        return seconds + (self.config.steps - self._num_warm) * self.step(self.config.global_batch_rows).seconds

    @property
    def _num_warm(self) -> int:
        """Steps whose batch may be smaller."""
        warmup = self.config.batch_warmup
        return 0 if warmup is None else min(self.config.steps, warmup.steps)


def _time_lines(config: TrainingConfig, rows: Rows, machines: Machines, clock: _Clock) -> Iterator[str]:
    total_rows = config.step_rows.before(config.steps + 1)
    step, hours = clock.step(config.global_batch_rows), clock.run_seconds() / 3600
    inputs = sum(share * inputs for share, inputs, _ in rows.kinds)
    micro_batches = num_micro_batches(config, machines.gpus)
    yield (
        f"steps      {config.steps:,} of {config.global_batch_rows} rows: {_count(micro_batches, 'micro-batch', 'micro-batches')} "
        f"of {_count(config.micro_batch_rows, 'row')} on each rank"
    )
    empty = micro_batches * config.micro_batch_rows * machines.gpus - config.global_batch_rows
    if empty:
        yield f"           {_count(empty, 'row')} of each step {'is' if empty == 1 else 'are'} empty, to make the ranks' shares equal, and take time like others"
    yield (
        f"FLOPs      {clock.row_flops * config.global_batch_rows:.4g} a step, {clock.row_flops * total_rows:.4g} the run"
        " (model FLOPs, each row as one document, none empty)"
    )
    yield f"time       {step.seconds:.3g} s a step, {hours:.3g} h the run; {config.global_batch_rows * inputs / step.seconds:,.0f} input tokens a second"
    yield (
        f"           {step.compute_seconds:.3g} s of a step are arithmetic (assumed: MFU {machines.mfu:.0%} of "
        f"{machines.accelerator.peak_flops(config.precision) / 1e12:,.0f} TFLOP/s), {step.exposed_seconds:.3g} s communication that it does not hide"
    )
    yield f"cost       {hours * machines.gpus * machines.price:,.2f} (assumed: {machines.price:g} for a GPU and hour)"


def _scaling_lines(config: TrainingConfig, machines: Machines, clock: _Clock) -> Iterator[str]:
    """What ranks exchange, and what share of a step is left to arithmetic, here and on other numbers of such nodes."""
    if config.deepspeed is None or machines.gpus == 1:
        return
    step, network = clock.step(config.global_batch_rows), clock.network
    yield (
        f"scaling    {step.communication_seconds:.3g} s of communication in a step, {_gib(step.bytes_sent)} sent by each GPU;"
        f" efficiency, the share of arithmetic in the time, {step.efficiency:.0%}"
    )
    within = network.within["all_gather"]
    yield f"           (predicted; assumed: {_link(within)} within a node, {_link(machines.between)} between nodes)"
    unit = config.deepspeed.hpz_partition_size
    num_nodes = [nodes for nodes in SCALING_NODES if nodes * network.node_ranks % unit == 0]
    micro_batches = num_micro_batches(config, machines.gpus)
    steps = predict_nodes(
        clock.weights,
        config,
        config.deepspeed,
        network,
        num_nodes=num_nodes,
        micro_batches=micro_batches,
        compute_seconds=clock.compute_seconds(micro_batches),
    )
    shares = ", ".join(f"{nodes}: {one.efficiency:.0%}" for nodes, one in zip(num_nodes, steps, strict=True))
    yield f"           with as many rows for each GPU, efficiency on such nodes: {shares}"


def _published_link(accelerator: Accelerator) -> Link:
    """Of a device to its neighbours in the node: a share of what its links carry one way, or of PCIe."""
    one_way = PCIE_BYTES_PER_SECOND if accelerator.link_bandwidth is None else accelerator.link_bandwidth / 2
    return Link(latency_seconds=1e-6, bytes_per_second=LINK_SHARE * one_way)


def _link(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:g} GB/s and {link.latency_seconds * 1e6:g} us"


def _checkpoint_lines(
    config: TrainingConfig, model: nn.Module, parameters: Parameters, machines: Machines
) -> Iterator[str]:
    num_bytes = checkpoint_bytes(
        model.parameters(), num_moments=config.optimizer.num_moments, keeps_average=config.ema_decay is not None
    )
    seconds = num_bytes / (machines.disk_gbps * 1e9)
    yield f"checkpoint {_gib(num_bytes)}, written in {seconds:.3g} s behind training (assumed: {machines.disk_gbps:g} GB/s to the run folder)"
    is_sharded = config.deepspeed is not None and config.deepspeed.zero_stage > 0
    of_trained = num_bytes - FLOAT_BYTES * parameters.frozen
    of_rank = of_trained // (machines.gpus if is_sharded else 1) + 2 * FLOAT_BYTES * parameters.frozen
    of_node = of_rank * (machines.gpus // machines.nodes) if is_sharded else of_rank
    yield f"           host memory of its copy: {_gib(of_rank)} a rank{'' if is_sharded else ', on the first alone'}, {_gib(of_node)} a node"


def _activations(
    config: TrainingConfig, model_config: SpadeT5Config, rows: Rows, precision: str, machines: Machines
) -> Activations:
    architecture = machines.accelerator.architecture
    return trace_activations(
        model_config,
        Workload(
            rows=config.micro_batch_rows,
            inputs_length=rows.inputs_length,
            targets_length=rows.targets_length,
            precision=precision,
            recomputation=config.recomputation,
            backend="torch" if config.kernel_backend in ("torch", "naive") else "triton",
            architecture=architecture if architecture.startswith("sm_") else "sm_90",
        ),
    )


def _states(config: TrainingConfig, parameters: Parameters, gpus: int) -> RankStates:
    return largest_rank(config, parameters, world_size=gpus)


def _table(
    config: TrainingConfig, parameters: Parameters, machines: Machines, traced: dict[str, Activations]
) -> Iterator[str]:
    lines = [["precision", "ZeRO", "weights", "gradients", "optimizer", "buffers", "activations", "largest", ""]]
    own_stage = None if config.deepspeed is None else config.deepspeed.zero_stage
    # Without DeepSpeed a run is in one process, so for others there is no such row.
    stages: list[int | None] = [None] if own_stage is None else []
    for precision in PRECISIONS:
        for stage in (*stages, 0, 1, 2, 3):
            if (precision == "bf16" and not stage) or (stage or 0) > config.optimizer.max_zero_stage:
                continue
            of_stage = _at_stage(config, precision, stage)
            states = _states(of_stage, parameters, machines.gpus)
            largest = states.largest(traced[precision].peak)
            is_own = precision == config.precision and stage == own_stage
            mark = ("* " if is_own else "") + ("" if largest <= machines.usable_bytes else "does not fit")
            lines.append(
                [
                    precision,
                    "none" if stage is None else str(stage),
                    _gib(states.weights + states.frozen),
                    _gib(states.gradients + states.accumulated),
                    _gib(states.master + states.moments + states.average),
                    _gib(states.buckets + states.persistent + states.secondary + states.gathered),
                    _gib(traced[precision].peak),
                    _gib(largest),
                    mark,
                ]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield (
            "  ".join(cell.rjust(width) for cell, width in zip(cells[:-1], widths, strict=False))
            + f"  {cells[-1]}".rstrip()
        )


def _at_stage(config: TrainingConfig, precision: str, stage: int | None) -> TrainingConfig:
    """The same run in another precision and at another stage, None without DeepSpeed, without what only its own stage has."""
    deepspeed = None if stage is None else config.deepspeed or DeepSpeedConfig()
    if deepspeed is not None and deepspeed.zero_stage != stage:
        deepspeed = dataclasses.replace(
            deepspeed,
            zero_stage=stage,  # type: ignore[arg-type]
            offload_optimizer=deepspeed.offload_optimizer and bool(stage),
            offload_parameters=False,
            hpz_partition_size=1,
        )
    return dataclasses.replace(config, precision=precision, deepspeed=deepspeed)  # type: ignore[arg-type]


def _verdict(
    config: TrainingConfig, parameters: Parameters, machines: Machines, once: Activations, twice: Activations
) -> Iterator[str]:
    """Whether the run fits, and how many rows would.

    Raises:
        ConfigError: it does not fit.
    """
    usable, states = machines.usable_bytes, _states(config, parameters, machines.gpus)
    where = f"on each {machines.accelerator.name}, which has {_gib(usable)} to give"
    most = largest_micro_batch(config, parameters, machines, once, twice)
    if states.update_peak > usable and most > 0:  # so no other number of rows helps
        raise ConfigError(
            f"training.deepspeed: the update of the weights needs {_gib(states.update_peak)} {where}; "
            "use more GPUs, a higher training.deepspeed.zero_stage, or training.precision=bf16"
        )
    rank_rows = -(-config.global_batch_rows // machines.gpus)
    if states.largest(once.peak) > usable:
        remedy = (
            f"set training.micro_batch_rows={min(most, rank_rows)}"
            if most > 0
            else "use more GPUs, a higher training.deepspeed.zero_stage, training.gradient_checkpointing=full, or training.precision=bf16"
        )
        raise ConfigError(
            f"training.micro_batch_rows: {config.micro_batch_rows} rows at once need {_gib(states.largest(once.peak))} {where}; {remedy}"
        )
    yield (
        f"           it fits into {_gib(usable)} ({_gib(machines.accelerator.memory_bytes)} without the {_gib(RESERVE_BYTES)} and "
        f"{RESERVE_SHARE:.0%} assumed for driver, NCCL and gaps)"
    )
    most = max(most, config.micro_batch_rows)
    yield f"           the largest micro-batch that fits is about {most:,} rows; a rank has {rank_rows:,} in a step"


def largest_micro_batch(
    config: TrainingConfig, parameters: Parameters, machines: Machines, once: Activations, twice: Activations
) -> int:
    """Rows of the largest micro-batch beside which the backward pass fits; 0 if one row does not.

    Args:
        config: of the run.
        parameters: of its model.
        machines: that it is planned for.
        once: of its micro-batch.
        twice: of one with twice the rows; in between and beyond, bytes are taken to follow a straight line.
    """
    of_row = max(1.0, (twice.peak - once.peak) / config.micro_batch_rows)
    constant = once.peak - of_row * config.micro_batch_rows

    def rows_beside(states: RankStates) -> int:
        return max(0, int((machines.usable_bytes - states.backward_peak - constant) / of_row))

    # Fewer rows than a rank's share of a step accumulate, and gradients of earlier micro-batches are then held besides.
    rank_rows = -(-config.global_batch_rows // machines.gpus)
    whole = rows_beside(_states(dataclasses.replace(config, micro_batch_rows=rank_rows), parameters, machines.gpus))
    if whole >= rank_rows:
        return whole
    shared = rows_beside(_states(dataclasses.replace(config, micro_batch_rows=1), parameters, machines.gpus))
    return min(shared, rank_rows - 1)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"

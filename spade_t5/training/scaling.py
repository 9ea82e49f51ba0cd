"""How long a step takes on many ranks: its arithmetic, which is given, and the part of its communication that arithmetic does not hide.

A collective of B bytes among n ranks runs around a ring, p times: an all-reduce twice, the others once. With N nodes the ring leaves a node N times:

    seconds = p ((n - 1 - N) a_w + N a_b + (n - 1)/n B / min(w_w, w_b))            N = 0 within one node

a: latency of a hop, w: bytes a second, within a node (`w`) and between nodes (`b`); w_b is what a whole node sends, since the ring, or the
rings that share the bytes among a node's network cards, leave it with all of them. Both may differ from collective to collective: gloo
reduces and scatters by a whole all-reduce, for which w is half as much. NCCL has trees besides, which all-reduce short messages in
2 (g - 1) a_w + 2 ceil(log2 N) a_b (g ranks a node) at the same bandwidth; the faster of the two counts.

    step = compute + what is exposed of communication               efficiency = compute / step

ZeRO 0 to 2 wait for every collective: DeepSpeed overlaps the reduction of gradients with the backward pass at these stages only if told so, and
we do not. Under ZeRO 3 on GPUs gathering goes on beside the forward pass, gathering and scattering beside the backward pass, which has two
thirds of the arithmetic. Of each phase there is exposed what takes longer than its arithmetic, and at least one call in a micro-batch, the first
gathering or the last scattering, beside which nothing can run. What concurrent communication takes from arithmetic is left out, and so are
ranks that wait for slower ones and whatever else uses the network.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spade_t5.errors import ConfigError
from spade_t5.messages import shown
from spade_t5.training.bandwidth import CollectiveTime, bus_factor
from spade_t5.training.communication import Kind, ModelWeights, Traffic, step_traffic
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig

FORWARD_SHARE = 1 / 3
"""Of the arithmetic; the backward pass multiplies twice as much."""
_PASSES: dict[Kind, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What carries a message to the next rank of a ring."""

    latency_seconds: float
    """Of a message without content."""
    bytes_per_second: float
    """In one direction."""


def parse_link(words: str) -> Link:
    """A link from GB/s:microseconds, such as "360:1".

    Raises:
        ConfigError: they are no such numbers.
    """
    bandwidth, _, latency = words.partition(":")
    try:
        result = Link(latency_seconds=float(latency) * 1e-6, bytes_per_second=float(bandwidth) * 1e9)
    except ValueError:
        raise ConfigError(f"link: {shown(words)} is not GB/s:microseconds; give for example 360:5") from None
    if not (0 < result.bytes_per_second < math.inf and 0 <= result.latency_seconds < math.inf):
        raise ConfigError(f"link: {shown(words)} needs a positive bandwidth and a latency that is not negative")
    return result


Links = Mapping[Kind, Link]
"""By collective."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What connects the ranks."""

    node_ranks: int
    """Ranks of a node."""
    within: Links
    """From a rank to another of its node."""
    between: Links
    """From a node to another: all that a node can send, over all its network cards."""
    is_gpu: bool = True
    """Whether NCCL serves, which has trees, and communication can go on beside arithmetic; gloo has none, and training waits for it."""

    def seconds(self, traffic: Traffic) -> float:
        """How long collectives take, one behind the other."""
        num_ranks, passes = traffic.num_ranks, _PASSES[traffic.kind]
        num_nodes = -(-num_ranks // self.node_ranks)
        within, between = self.within[traffic.kind], self.between[traffic.kind]
        crossings = 0 if num_nodes == 1 else min(num_nodes, num_ranks - 1)
        used = [link for link, is_used in ((within, self.node_ranks > 1), (between, num_nodes > 1)) if is_used]
        latency = passes * ((num_ranks - 1 - crossings) * within.latency_seconds + crossings * between.latency_seconds)
        if traffic.kind == "all_reduce" and self.is_gpu:
            inside = (min(self.node_ranks, num_ranks) - 1) * within.latency_seconds
            latency = min(latency, 2 * (inside + math.ceil(math.log2(num_nodes)) * between.latency_seconds))
        carried = passes * (num_ranks - 1) / num_ranks * traffic.nbytes
        return traffic.calls * latency + carried / min(link.bytes_per_second for link in used)


def gpu_network(*, node_ranks: int, within: Link, between: Link) -> Network:
    """GPUs under NCCL, to all of whose collectives a link is the same.

    Args:
        node_ranks: GPUs of a node.
        within: from a GPU to the next of its node.
        between: from a node to the next: what all its network cards send together.
    """
    return Network(
        node_ranks=node_ranks, within=dict.fromkeys(_PASSES, within), between=dict.fromkeys(_PASSES, between)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """A predicted step."""

    num_ranks: int
    """Ranks."""
    compute_seconds: float
    """Arithmetic of a rank, as given."""
    communication_seconds: float
    """All collectives, one behind the other."""
    exposed_seconds: float
    """What of them the arithmetic does not hide."""
    bytes_sent: float
    """By each rank in a step."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute_seconds + self.exposed_seconds

    @property
    def efficiency(self) -> float:
        """Share of the step that is arithmetic: the speed of a rank relative to one that need not communicate."""
        return self.compute_seconds / self.seconds


def predict_step(
    model: ModelWeights,
    config: TrainingConfig,
    deepspeed: DeepSpeedConfig,
    network: Network,
    *,
    world_size: int,
    compute_seconds: float,
    num_loss_groups: int = 0,
) -> StepTime:
    """Time of a step on so many ranks.

    Args:
        model: its weights.
        config: how it is trained; the global batch is that of all these ranks.
        deepspeed: its `deepspeed`.
        network: what connects the ranks.
        world_size: their number.
        compute_seconds: arithmetic of a rank in a step, over all its micro-batches.
        num_loss_groups: labels of the objective's groups.
    """
    traffic = step_traffic(model, config, deepspeed, world_size=world_size, num_loss_groups=num_loss_groups)
    micro_batches = -(-config.global_batch_rows // (world_size * config.micro_batch_rows))
    waited = [one for one in traffic if not (network.is_gpu and one.is_overlapped)]
    exposed = sum(map(network.seconds, waited))
    for phase, share in (("forward", FORWARD_SHARE), ("backward", 1 - FORWARD_SHARE)):
        beside = [one for one in traffic if one not in waited and one.phase == phase]
        exposed += _exposed(beside, network, share * compute_seconds, micro_batches)
    return StepTime(
        num_ranks=world_size,
        compute_seconds=compute_seconds,
        communication_seconds=sum(map(network.seconds, traffic)),
        exposed_seconds=exposed,
        bytes_sent=sum(one.nbytes * _PASSES[one.kind] * (one.num_ranks - 1) / one.num_ranks for one in traffic),
    )


def _exposed(traffic: Sequence[Traffic], network: Network, compute_seconds: float, micro_batches: int) -> float:
    """What of the communication of a phase takes longer than its arithmetic, and at least a call of each kind in every micro-batch."""
    seconds = [network.seconds(one) for one in traffic]
    least = sum(each * min(micro_batches / one.calls, 1) for one, each in zip(traffic, seconds, strict=True))
    return max(sum(seconds) - compute_seconds, least)


def predict_nodes(
    model: ModelWeights,
    config: TrainingConfig,
    deepspeed: DeepSpeedConfig,
    network: Network,
    *,
    num_nodes: Iterable[int],
    micro_batches: int,
    compute_seconds: float,
) -> list[StepTime]:
    """Steps on ever more nodes, each rank with the same number of micro-batches, so that the global batch grows with the nodes (weak scaling).

    Args:
        model: its weights.
        config: how it is trained; its global batch does not matter.
        deepspeed: its `deepspeed`.
        network: what connects the ranks.
        num_nodes: numbers of nodes.
        micro_batches: of a rank in a step.
        compute_seconds: arithmetic of a rank in a step.
    """
    results = []
    for nodes in num_nodes:
        world_size = nodes * network.node_ranks
        grown = replace(config, global_batch_rows=world_size * micro_batches * config.micro_batch_rows)
        results.append(
            predict_step(model, grown, deepspeed, network, world_size=world_size, compute_seconds=compute_seconds)
        )
    return results


def fit_links(times: Sequence[CollectiveTime]) -> Links:
    """The links of a ring whose hops are all alike, from measured times: of each collective the line a + b bytes with the least relative errors.

    Raises:
        ValueError: of some collective there are not two sizes.
    """
    links: dict[Kind, Link] = {}
    for kind in _PASSES:
        own = [one for one in times if one.name == kind]
        if len({one.num_bytes for one in own}) < 2:
            raise ValueError(f"times: give at least two sizes of {kind}")
        hops = _PASSES[kind] * (own[0].num_ranks - 1)
        latency, slope = _line([one.num_bytes for one in own], [one.seconds for one in own])
        links[kind] = Link(latency_seconds=latency / hops, bytes_per_second=bus_factor(kind, own[0].num_ranks) / slope)
    return links


def _line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope, neither negative, of the line that comes closest to points in the sum of squared relative errors."""
    x, y = np.array(sizes), np.array(seconds)
    terms = np.stack([np.ones_like(y), x], axis=1) / y[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(terms, np.ones_like(y), rcond=None)
    if intercept < 0:
        intercept, slope = 0.0, (x / y).sum() / ((x / y) ** 2).sum()
    return float(intercept), max(float(slope), 1e-15)

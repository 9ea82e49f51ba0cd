"""The arithmetic of the scaling model, on numbers that can be done in the head."""

import pytest

from spade_t5.training.bandwidth import CollectiveTime
from spade_t5.training.communication import Block, ModelWeights, Traffic, Weight
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.scaling import Link, Network, fit_links, gpu_network, predict_nodes, predict_step

FAST, SLOW = Link(latency_seconds=1e-6, bytes_per_second=1e9), Link(latency_seconds=1e-4, bytes_per_second=1e8)
KINDS = ("all_reduce", "reduce_scatter", "all_gather")


def network(node_ranks: int, *, is_gpu: bool = False) -> Network:
    """Fast within nodes, slow between them."""
    links = {name: dict.fromkeys(KINDS, link) for name, link in (("within", FAST), ("between", SLOW))}
    return Network(node_ranks=node_ranks, is_gpu=is_gpu, **links)  # type: ignore[arg-type]


def traffic(kind: str, num_ranks: int, nbytes: int = 0, calls: int = 1) -> Traffic:
    return Traffic(kind, "gradients", "backward", num_ranks, calls, nbytes)  # type: ignore[arg-type]


# A square matrix of 10^6 elements and a vector of 1000, in one module.
MODEL = ModelWeights(weights=(Weight(1_000_000, 0), Weight(1000, 1)), root=Block((0, 1), ()))


def training(zero_stage: int, *, rows: int = 8) -> TrainingConfig:
    return TrainingConfig(
        steps=1,
        global_batch_rows=rows,
        micro_batch_rows=1,
        optimizer=AdamWConfig(learning_rate=1e-3),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("kind", "num_ranks", "node_ranks", "expected"),
    [
        # Within a node: 3 hops, and 3/4 of the bytes through each link; an all-reduce goes around twice.
        ("all_gather", 4, 8, 3 * 1e-6 + 0.75 * 4e6 / 1e9),
        ("all_reduce", 4, 8, 6 * 1e-6 + 1.5 * 4e6 / 1e9),
        # One rank a node: every hop is slow.
        ("all_gather", 4, 1, 3 * 1e-4 + 0.75 * 4e6 / 1e8),
        # Two nodes of four: 7 hops, of which 2 leave a node, and the slow link sets the pace.
        ("reduce_scatter", 8, 4, 5 * 1e-6 + 2 * 1e-4 + 7 / 8 * 4e6 / 1e8),
    ],
)
def test_a_ring_by_hand(kind: str, num_ranks: int, node_ranks: int, expected: float) -> None:
    assert network(node_ranks).seconds(traffic(kind, num_ranks, 4_000_000)) == pytest.approx(expected)
    three = network(node_ranks).seconds(traffic(kind, num_ranks, 12_000_000, calls=3))
    assert three == pytest.approx(3 * expected)


def test_short_all_reduces_of_gpus_take_a_tree() -> None:
    """64 nodes of 8: 7 hops within a node and 6 levels of nodes, up and down, rather than 511 hops twice."""
    cluster = gpu_network(node_ranks=8, within=FAST, between=SLOW)
    assert cluster.seconds(traffic("all_reduce", 512)) == pytest.approx(2 * (7 * 1e-6 + 6 * 1e-4))
    assert cluster.seconds(traffic("all_gather", 512)) == pytest.approx(447 * 1e-6 + 64 * 1e-4)
    assert network(8).seconds(traffic("all_reduce", 512)) == pytest.approx(2 * (447 * 1e-6 + 64 * 1e-4))


def test_zero_1_waits_for_all_it_sends() -> None:
    config = training(1)
    assert config.deepspeed is not None
    step = predict_step(MODEL, config, config.deepspeed, network(4, is_gpu=True), world_size=4, compute_seconds=0.05)
    gradients = 1.5 * 4 * 1_001_000 / 1e9
    gathered = 0.75 * 4 * 1_001_000 / 1e9
    assert step.communication_seconds == pytest.approx(gradients + gathered, rel=0.02)  # the rest: norms and flags
    assert step.exposed_seconds == step.communication_seconds
    assert step.efficiency == pytest.approx(0.05 / (0.05 + step.communication_seconds))


def test_zero_3_hides_what_the_arithmetic_is_long_enough_for() -> None:
    """On GPUs; but never the first gathering and the last scattering of a micro-batch, which here are all there is."""
    config = training(3, rows=32)
    assert config.deepspeed is not None
    arguments = (MODEL, config, config.deepspeed)
    on_cpu = predict_step(*arguments, network(8), world_size=8, compute_seconds=1.0)
    assert on_cpu.exposed_seconds == on_cpu.communication_seconds
    on_gpu = predict_step(*arguments, network(8, is_gpu=True), world_size=8, compute_seconds=1.0)
    assert on_gpu.exposed_seconds == pytest.approx(on_gpu.communication_seconds)
    many = ModelWeights(
        weights=tuple(Weight(40_000_000, 0) for _ in range(12)),
        root=Block((), tuple(Block((place,), ()) for place in range(12))),
    )
    on_gpu = predict_step(many, config, config.deepspeed, network(8, is_gpu=True), world_size=8, compute_seconds=1e3)
    assert on_gpu.exposed_seconds < 0.5 * on_gpu.communication_seconds
    hurried = predict_step(many, config, config.deepspeed, network(8, is_gpu=True), world_size=8, compute_seconds=1e-3)
    assert hurried.exposed_seconds == pytest.approx(hurried.communication_seconds, rel=1e-3)


def test_more_nodes_with_the_same_work_for_each_rank() -> None:
    config = training(1)
    assert config.deepspeed is not None
    steps = predict_nodes(
        MODEL,
        config,
        config.deepspeed,
        gpu_network(node_ranks=8, within=FAST, between=SLOW),
        num_nodes=(1, 2, 64),
        micro_batches=4,
        compute_seconds=0.1,
    )
    assert [step.num_ranks for step in steps] == [8, 16, 512]
    assert steps[0].efficiency > 0.8 > steps[1].efficiency > steps[2].efficiency
    # A ring's volume hardly grows with its length.
    assert steps[2].bytes_sent == pytest.approx(steps[1].bytes_sent, rel=0.1)


def timed(name: str, num_ranks: int, nbytes: int, seconds: float) -> CollectiveTime:
    return CollectiveTime(name=name, backend="gloo", num_ranks=num_ranks, num_bytes=nbytes, seconds=seconds)  # type: ignore[arg-type]


def test_links_are_fitted_to_what_the_model_says_of_them() -> None:
    slow = network(1)
    times = [
        timed(kind, 4, nbytes, slow.seconds(traffic(kind, 4, nbytes))) for kind in KINDS for nbytes in (8, 10**5, 10**7)
    ]
    for link in fit_links(times).values():
        assert link.latency_seconds == pytest.approx(SLOW.latency_seconds)
        assert link.bytes_per_second == pytest.approx(SLOW.bytes_per_second)
    with pytest.raises(ValueError, match="at least two sizes of all_gather"):
        fit_links([one for one in times if one.name != "all_gather"])


def test_a_fitted_latency_is_never_negative() -> None:
    times = [timed(kind, 2, nbytes, nbytes**1.2 * 1e-9) for kind in KINDS for nbytes in (8, 10**5, 10**7)]
    assert all(link.latency_seconds >= 0 and link.bytes_per_second > 0 for link in fit_links(times).values())

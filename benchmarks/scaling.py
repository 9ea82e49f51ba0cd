"""How runs scale to many nodes: what the scaling model predicts, and how well it predicts steps on links that were made slow.

    spade-t5 bench scaling [--out docs/results] [--gpu h100] [--mfu 0.4] [--node-ranks 8] [--within 360:1] [--between "NAME=GB/s:us" ...]
                           [--skip-check] [--quick]

The check runs ranks on hosts that are network namespaces of this machine (root, iproute2 and sshd are needed): everything in it is measured.
Efficiency on 1 to 64 nodes is predicted from the GPU, the share of its peak (MFU) and the links that are assumed; the file and the plot say so.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.benchmarks import report, script
from spade_t5.benchmarks.shaped_links import Comparison, Layout, Shape, compare
from spade_t5.devices import Accelerator, find_accelerator
from spade_t5.errors import ConfigError
from spade_t5.flops import FlopsCounter
from spade_t5.training.communication import ModelWeights, describe
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.optimizers import AdamWConfig
from spade_t5.training.scaling import Link, StepTime, gpu_network, parse_link, predict_nodes

NODES = (1, 2, 4, 8, 16, 32, 64)
MICRO_ROWS = {"base": 32, "large": 16, "xl": 8}
"""Rows of a micro-batch by preset."""
INPUTS_LENGTH, TARGETS_LENGTH = 512, 114
MICRO_BATCHES = (1, 4)
WITHIN = "360:1"
BETWEEN = ("8 x 400 Gbit/s InfiniBand=360:5", "100 Gbit/s Ethernet=11:20")
"""Nobody measured these: 0.8 of what NVLink carries one way, 0.9 of the cards, and latencies about those that NCCL itself reckons with."""
DOMINATED_SHARE = 0.5
"""Communication dominates a step of which it is at least so much."""
GOAL_ERROR = 0.2
LAYOUTS = (Layout(2, 1), Layout(4, 1), Layout(2, 2))
SHAPES = (Shape(1000), Shape(200), Shape(50), Shape(200, 5), Shape(50, 5))
Precision = Literal["bf16_autocast", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is predicted at once: one curve."""

    preset: str
    """Size of the model."""
    network: str
    """What is assumed between nodes."""
    precision: Precision
    """Of training."""
    zero_stage: int
    """Of DeepSpeed."""
    is_hierarchical: bool
    """Whether each node holds a second copy (hpZ)."""
    micro_batches: int
    """Of a rank in a step."""

    @property
    def stage_name(self) -> str:
        """As a legend has it."""
        return f"ZeRO {self.zero_stage}" + (", hpZ" if self.is_hierarchical else "")


def named_link(words: str) -> tuple[str, Link]:
    """Parses NAME=GB/s:microseconds."""
    name, sign, values = words.rpartition("=")
    if not sign:
        raise ConfigError(f"--between: {words!r} has no name; give NAME=GB/s:microseconds")
    return name, parse_link(values)


def cases(networks: list[str]) -> Iterator[Case]:
    """All curves; bf16 weights need ZeRO 1 at least."""
    for preset in MICRO_ROWS:
        for network in networks:
            for precision in get_args(Precision):
                for stage, is_hierarchical in ((0, False), (1, False), (2, False), (3, False), (3, True)):
                    if stage > 0 or precision != "bf16":
                        for micro_batches in MICRO_BATCHES:
                            yield Case(
                                preset=preset,
                                network=network,
                                precision=precision,
                                zero_stage=stage,
                                is_hierarchical=is_hierarchical,
                                micro_batches=micro_batches,
                            )


def micro_batch_flops(preset: str) -> float:
    """Model FLOPs of a micro-batch without padding."""
    counter = FlopsCounter(
        SpadeT5Config.from_preset(preset), backend="triton", device_type="cuda", dtype=torch.bfloat16
    )
    rows = MICRO_ROWS[preset]
    ids = torch.ones(rows, INPUTS_LENGTH, dtype=torch.int64)
    return counter.batch({"input_ids": ids, "labels": ids[:, :TARGETS_LENGTH]}).model


def predict(
    case: Case, model: ModelWeights, flops: float, gpu: Accelerator, options: argparse.Namespace
) -> list[StepTime]:
    """A curve over `NODES`."""
    deepspeed = DeepSpeedConfig(
        zero_stage=case.zero_stage,  # type: ignore[arg-type]
        hpz_partition_size=options.node_ranks if case.is_hierarchical else 1,
    )
    config = TrainingConfig(
        steps=1,
        global_batch_rows=MICRO_ROWS[case.preset],
        micro_batch_rows=MICRO_ROWS[case.preset],
        optimizer=AdamWConfig(learning_rate=1e-3),
        precision=case.precision,
        deepspeed=deepspeed,
    )
    between = dict(map(named_link, options.between))[case.network]
    return predict_nodes(
        model,
        config,
        deepspeed,
        gpu_network(node_ranks=options.node_ranks, within=parse_link(options.within), between=between),
        num_nodes=NODES,
        micro_batches=case.micro_batches,
        compute_seconds=case.micro_batches * flops / (options.mfu * gpu.peak_flops(case.precision)),
    )


def predictions(options: argparse.Namespace) -> dict[str, Any]:
    """All curves, with what they assume."""
    gpu = find_accelerator(options.gpu)
    networks = [name for name, _ in map(named_link, options.between)]
    curves = []
    models, flops = {}, {preset: micro_batch_flops(preset) for preset in MICRO_ROWS}
    for preset in MICRO_ROWS:
        with torch.device("meta"):
            models[preset] = describe(SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset(preset)))
    for case in cases(networks):
        steps = predict(case, models[case.preset], flops[case.preset], gpu, options)
        curves.append(_curve_json(case, steps))
    return {
        "source": "predicted",
        "assumed": {
            "gpu": gpu.name,
            "mfu": options.mfu,
            "node_ranks": options.node_ranks,
            "link_within_a_node": options.within,
            "links_between_nodes": options.between,
            "unit_of_links": "GB/s:microseconds; between nodes what a whole node sends",
            "inputs_length": INPUTS_LENGTH,
            "targets_length": TARGETS_LENGTH,
            "micro_batch_rows": MICRO_ROWS,
            "scaling": "weak: every rank has as many rows on any number of nodes",
            "not_looked_at": "whether a model fits into memory at a stage",
        },
        "model_flops_of_a_micro_batch": flops,
        "nodes": NODES,
        "curves": curves,
    }


def check(*, is_quick: bool) -> dict[str, Any]:
    """Steps on slow links, measured and predicted."""
    layouts, shapes = (LAYOUTS[:1], (Shape(50),)) if is_quick else (LAYOUTS, SHAPES)
    print(f"{'hosts x ranks':14} {'Mbit/s':>7} {'delay':>6} ZeRO  measured  predicted  error  communication")
    results = []
    for found in compare(layouts, shapes):
        delay = f"{found.shape.delay_milliseconds} ms"
        print(
            f"{f'{found.layout.num_hosts} x {found.layout.host_ranks}':14} {found.shape.megabits_per_second or '-':>7} {delay:>6} {found.zero_stage:4}"
            f" {found.measured_seconds:7.3f} s  {found.predicted.seconds:7.3f} s  {found.ratio - 1:+5.0%}  {found.communication_share:.0%}",
            flush=True,
        )
        results.append(found)
    dominated = [one for one in results if one.communication_share >= DOMINATED_SHARE]
    errors = sorted(abs(one.ratio - 1) for one in dominated)
    within = sum(error <= GOAL_ERROR for error in errors)
    print(
        f"where communication dominates: {within} of {len(errors)} steps within {GOAL_ERROR:.0%}, worst {max(errors, default=0):.0%}"
    )
    return {
        "source": "measured on this machine, beside predictions from the links measured with two hosts",
        "dominated_share": DOMINATED_SHARE,
        "dominated": {"steps": len(errors), "within_goal": within, "goal_error": GOAL_ERROR, "errors": errors},
        "links": [_links_json(one) for one in results if one.zero_stage == 0 and one.layout == results[0].layout],
        "steps": [_comparison_json(one) for one in results],
    }


def _curve_json(case: Case, steps: list[StepTime]) -> dict[str, Any]:
    return {
        **dataclasses.asdict(case),
        "compute_seconds": steps[0].compute_seconds,
        **{
            name: [float(f"{getattr(step, name):.4g}") for step in steps]
            for name in ("seconds", "exposed_seconds", "bytes_sent", "efficiency")
        },
    }


def _comparison_json(one: Comparison) -> dict[str, Any]:
    return {
        **one.layout._asdict(),
        **one.shape._asdict(),
        "zero_stage": one.zero_stage,
        "measured_seconds": one.measured_seconds,
        "predicted_seconds": one.predicted.seconds,
        "communication_share": one.communication_share,
        "error": one.ratio - 1,
        "measured_compute_seconds": one.predicted.compute_seconds,
    }


def _links_json(one: Comparison) -> dict[str, Any]:
    """A shape, and the link that two hosts have under it, by collective."""
    return {**one.shape._asdict(), "measured": {kind: dataclasses.asdict(each) for kind, each in one.links.items()}}


def draw(predicted: dict[str, Any], path: Path) -> None:
    """Efficiency over the number of nodes: a row of plots for each network, a column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assumed = predicted["assumed"]
    networks = [name for name, _ in map(named_link, assumed["links_between_nodes"])]
    figure, grid = pyplot.subplots(
        len(networks), len(MICRO_ROWS), figsize=(12, 1.4 + 3.2 * len(networks)), squeeze=False, sharex=True, sharey=True
    )
    colours = {"ZeRO 0": "C7", "ZeRO 1": "C0", "ZeRO 2": "C1", "ZeRO 3": "C2", "ZeRO 3, hpZ": "C3"}
    styles = {"bf16_autocast": "-", "bf16": "--"}
    for curve in predicted["curves"]:
        if curve["micro_batches"] > 1:
            continue
        case = Case(**{field.name: curve[field.name] for field in dataclasses.fields(Case)})
        axes = grid[networks.index(case.network)][list(MICRO_ROWS).index(case.preset)]
        label = f"{case.stage_name}, {case.precision}"
        width = 4 if case.zero_stage == 1 else 1.5  # with one micro-batch ZeRO 2 lies on it
        axes.plot(
            predicted["nodes"],
            curve["efficiency"],
            styles[case.precision],
            color=colours[case.stage_name],
            label=label,
            linewidth=width,
        )
        axes.set_title(
            f"{case.preset}, {MICRO_ROWS[case.preset]} rows a micro-batch\n{case.network} between nodes", fontsize=9
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(predicted["nodes"], [str(nodes) for nodes in predicted["nodes"]])
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel(f"nodes of {assumed['node_ranks']} GPUs")
    for row in grid:
        row[0].set_ylabel("efficiency")
    figure.suptitle("PREDICTED, not measured: share of a step that is arithmetic, one micro-batch a step")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8, bbox_to_anchor=(0.5, 0.035))
    links = "; ".join(
        f"{name}: {values} us"
        for name, _, values in (words.rpartition("=") for words in assumed["links_between_nodes"])
    )
    figure.text(
        0.5,
        0.008,
        f"assumed: {assumed['gpu']} at MFU {assumed['mfu']}, {INPUTS_LENGTH} inputs and {TARGETS_LENGTH} targets; links in GB/s:latency, within a node"
        f" {assumed['link_within_a_node']} us, between nodes {links}",
        ha="center",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of scaling.json and scaling.png")
    parser.add_argument("--gpu", default="h100", help="GPU that is assumed (default: h100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is assumed (default: 0.4)")
    parser.add_argument("--node-ranks", type=int, default=8, help="GPUs of a node (default: 8)")
    parser.add_argument("--within", default=WITHIN, help=f"link within a node, GB/s:microseconds (default: {WITHIN})")
    parser.add_argument(
        "--between",
        action="append",
        help=f"link between nodes, NAME=GB/s:microseconds, what a whole node sends; may be repeated (default: {' and '.join(BETWEEN)})",
    )
    parser.add_argument("--skip-check", action="store_true", help="only predict: no hosts are made")
    parser.add_argument(
        "--quick", action="store_true", help="check one slow link between two hosts: to see that it runs"
    )


def run(options: argparse.Namespace) -> None:
    """Check the model, predict, write scaling.json and scaling.png."""
    options.between = options.between or list(BETWEEN)
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu: {options.mfu} must lie between 0 and 1")
    if options.node_ranks < 1:
        raise ConfigError(f"--node-ranks: {options.node_ranks} must be at least 1")
    predicted = predictions(options)
    checked = None if options.skip_check else check(is_quick=options.quick)
    print(report.write("scaling", {"predictions": predicted, "check": checked}, options.out))
    draw(predicted, options.out / "scaling.png")
    print(options.out / "scaling.png")


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

"""Chooses launch configurations by measurement and writes them into the tables beside the kernels.

One number of a configuration is changed at a time (block sizes, warps, stages), from the configuration in the table onwards, and what is
faster by more than noise stays. A candidate must give the results of the table's configuration; one that does not launch is left out.
Workloads launch their kernels as the model does; the table is looked up through this module meanwhile, so that the time of the whole forward
or backward pass shows the effect of one kernel's configuration.
"""

import datetime
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spade_t5.benchmarks.kernels import correctness, measure
from spade_t5.benchmarks.kernels.cases import OURS, Workload, plan_for
from spade_t5.benchmarks.kernels.registry import OPS
from spade_t5.errors import ConfigError
from spade_t5.kernels import launch
from spade_t5.kernels.launch import LaunchConfig

_LEAST_GAIN = 0.02
"""Share of the time that a change must save, as two measurements of the same thing differ by about as much."""

_LARGEST = {"num_warps": 16, "num_stages": 5}
_SMALLEST = {"num_warps": 1, "num_stages": 1, "ROWS": 1, "PROGRAMS": 1}
_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 8192
_TUNING_SECONDS = 0.1

_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Relative difference between two configurations' results, by the dtype of the inputs: sums in another order."""

PartTimer = Callable[[Workload, str], float]
"""Seconds of the "forward" or "backward" pass of a workload."""


def tune(op: str) -> None:
    """Measure all variants of an op's table that its workloads launch, and rewrite the table after each.

    Args:
        op: name in the registry; one without Triton kernels is passed over.

    Raises:
        RedCheckError: the op is wrong with the configurations that the table holds.
        ConfigError: the table cannot be written.
    """
    if not launch.table_path(op).exists():
        print(f"{op}: no Triton kernels")
        return
    plan = plan_for("cuda", is_quick=False)
    correctness.run_checks(plan, {op: OPS[op]})
    workloads = OPS[op].tuning() or {case.name: case.contenders[OURS] for case in OPS[op].cases(plan)}
    tune_table(op, workloads, device=torch.device("cuda"), gpu=torch.cuda.get_device_name(), seconds_of=_seconds_on_gpu)


def tune_table(
    op: str,
    workloads: dict[str, Callable[[], Workload]],
    *,
    device: torch.device,
    gpu: str,
    seconds_of: PartTimer,
) -> None:
    """Tune the variants that the workloads launch, each on the first workload that launches it.

    Args:
        op: folder of the kernels.
        workloads: name to builder, the most important first.
        device: where they run; decides the architecture.
        gpu: its name, for the origin of the table.
        seconds_of: timer.
    """
    architecture = launch.architecture(device)
    lookups = _Lookups(op)
    tuned: dict[str, LaunchConfig] = {}
    for name, build in workloads.items():
        try:
            workload = build()
            with lookups.active():
                variants, expected = lookups.trace(workload)
        except Exception as problem:  # a shape that one GPU cannot hold must not end the tuning of the others
            print(f"{op}, {name}: left out: {type(problem).__name__}: {problem}")
            continue
        for variant, part in variants.items():
            if variant not in tuned:
                with lookups.active():
                    tuned[variant] = _descend(lookups, variant, part, workload, expected, seconds_of)
                lookups.replaced[variant] = tuned[variant]
                write_table(op, architecture, tuned, gpu)
                print(f"{op}, {architecture}, {variant}: {tuned[variant]}", flush=True)
        del workload, expected
    left = sorted(set(_nearest(_read(op)["configs"], architecture)) - set(tuned))
    if left:
        print(f"{op}: launched by no workload, so not tuned: {', '.join(left)}")


def candidates(config: LaunchConfig, key: str) -> list[LaunchConfig]:
    """The configurations in which one number is halved or doubled; stages go up and down by one."""
    value = config[key]
    values = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
    smallest, largest = _SMALLEST.get(key, _SMALLEST_BLOCK), _LARGEST.get(key, _LARGEST_BLOCK)
    return [{**config, key: new} for new in values if smallest <= new <= largest]


def write_table(op: str, architecture: str, tuned: dict[str, LaunchConfig], gpu: str) -> None:
    """Put measured configurations into an op's table; an architecture that is new there starts from the nearest one's.

    Raises:
        ConfigError: the table cannot be written.
    """
    table = _read(op)
    entries = {**_nearest(table["configs"], architecture), **tuned}
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "triton"))
    table["origin"] = (
        f"{architecture}: {len(tuned)} of {len(entries)} variants measured on {gpu}, {versions}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; all others chosen from compiled code, not measured on a GPU"
    )
    table["configs"][architecture] = entries
    path = launch.table_path(op)
    partial = path.with_suffix(".json.tmp")
    try:
        partial.write_text(_dump(table), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"--tune: {path} cannot be written ({error.strerror}); tune in a checkout or an editable install"
        ) from None
    launch._lookup.cache_clear()


class _Lookups:
    """Stands between the kernels and the table of one op: remembers what is looked up, and can replace it."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.replaced: dict[str, LaunchConfig] = {}
        self.seen: dict[str, LaunchConfig] = {}
        self._read_table = launch._lookup

    @contextmanager
    def active(self) -> Iterator[None]:
        """While this holds, lookups come here."""
        launch._lookup = self._lookup  # type: ignore[assignment]
        try:
            yield
        finally:
            launch._lookup = self._read_table

    def trace(self, workload: Workload) -> tuple[dict[str, str], list[Tensor]]:
        """Variants that a workload launches with the pass that does, and its results."""
        self.seen = {}
        outputs = workload.outputs()
        variants = dict.fromkeys(self.seen, "forward")
        gradients = workload.backward(outputs)
        variants |= dict.fromkeys((variant for variant in self.seen if variant not in variants), "backward")
        return variants, [x.detach() for x in (*outputs, *gradients)]

    def _lookup(self, op: str, variant: str, wanted: str) -> LaunchConfig:
        if op != self.op:
            return self._read_table(op, variant, wanted)
        self.seen[variant] = self.replaced.get(variant) or self._read_table(op, variant, wanted)
        return self.seen[variant]


def _descend(
    lookups: _Lookups, variant: str, part: str, workload: Workload, expected: list[Tensor], seconds_of: PartTimer
) -> LaunchConfig:
    """The fastest configuration found by changing one number after the other."""
    best = dict(lookups.seen[variant])
    best_seconds = seconds_of(workload, part)
    tried = [best]
    is_improved = True
    while is_improved:
        is_improved = False
        for key in tried[0]:
            for candidate in candidates(best, key):
                if candidate in tried:
                    continue
                tried.append(candidate)
                seconds = _seconds_if_right(lookups, variant, candidate, part, workload, expected, seconds_of)
                if seconds is not None and seconds < (1.0 - _LEAST_GAIN) * best_seconds:
                    best, best_seconds, is_improved = candidate, seconds, True
    return best


def _seconds_if_right(
    lookups: _Lookups,
    variant: str,
    candidate: LaunchConfig,
    part: str,
    workload: Workload,
    expected: list[Tensor],
    seconds_of: PartTimer,
) -> float | None:
    """Time with a candidate; None if it does not launch or gives something else."""
    lookups.replaced[variant] = candidate
    try:
        return seconds_of(workload, part) if _gives(workload, expected) else None
    except Exception as problem:  # too much shared memory, blocks that the kernel refuses
        print(f"  {variant} {candidate}: {type(problem).__name__}", flush=True)
        return None
    finally:
        del lookups.replaced[variant]


def _gives(workload: Workload, expected: list[Tensor]) -> bool:
    outputs = workload.outputs()
    results = (*outputs, *workload.backward(outputs))
    bound = _BOUNDS[workload.leaves[0].dtype]
    return all(correctness.relative_error(x, y) <= bound for x, y in zip(results, expected, strict=True))


def _seconds_on_gpu(workload: Workload, part: str) -> float:
    times = measure.time_on_gpu(workload, seconds=_TUNING_SECONDS)
    return measure.summary(times)[part]["median_seconds"]


def _read(op: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(launch.table_path(op).read_text(encoding="utf-8"))
    return table


def _nearest(configs: dict[str, dict[str, LaunchConfig]], architecture: str) -> dict[str, LaunchConfig]:
    """Entries that serve an architecture, as the launches find them."""
    if architecture in configs:
        return configs[architecture]
    number = int(architecture.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in configs if name != launch.INTERPRETER)
    older = [candidate for candidate in known if candidate <= number]
    return configs[f"sm_{older[-1] if older else known[0]}"]


def _dump(table: dict[str, Any]) -> str:
    """JSON with one variant a line, as the tables are written by hand."""
    architectures = []
    for name, entries in table["configs"].items():
        lines = (f"   {json.dumps(variant)}: {json.dumps(config)}" for variant, config in entries.items())
        architectures.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    configs = ",\n".join(architectures)
    return f'{{\n "origin": {json.dumps(table["origin"])},\n "configs": {{\n{configs}\n }}\n}}\n'

"""One examination: every node gathers facts about itself, some are measured between nodes, and all are brought together and compared."""

import functools
import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spade_t5.errors import UserError
from spade_t5.launch.doctor import machine, software, storage
from spade_t5.launch.doctor.checks import Comparison, Needs, compare
from spade_t5.launch.doctor.clocks import measure_clocks
from spade_t5.launch.doctor.network import measure_network
from spade_t5.launch.doctor.report import Gatherer, NodeReport, gather
from spade_t5.launch.doctor.sharing import sharing
from spade_t5.launch.rank import NODE_VARIABLE
from spade_t5.messages import reason_of
from spade_t5.training import distributed
from spade_t5.training.bandwidth import CollectiveTime
from spade_t5.training.shared_folder import make_folder, remove_empty


class Examination(NamedTuple):
    """What came out of it."""

    reports: list[NodeReport]
    """One of each node, the main rank's first."""
    times: list[CollectiveTime]
    """All-reduces of all ranks."""
    comparison: Comparison
    """What is wrong."""


def examine(config: Any, *, min_open_files: int | None) -> Examination:
    """Examines the nodes of this group of processes (a collective call); the same result on every rank.

    Args:
        config: the coming run's, or the error with which this node could not read it; None: no run is known.
        min_open_files: least limit of open files; None: by what the run needs.
    """
    names = distributed.gather_objects(os.environ.get(NODE_VARIABLE) or os.uname().nodename)
    speakers = {names.index(name): name for name in names}
    needs, run_dir = distributed.gather_objects((_needs(config, min_open_files), getattr(config, "run_dir", None)))[0]
    own, report = distributed.rank(), None
    if own in speakers:
        report = NodeReport(node=names[own], rank=own, num_ranks=names.count(names[own]))
        _note(report, *gather(_gatherers(config, is_main=own == 0)))
    if run_dir is not None:
        _examine_run_folder(run_dir, speakers, report)
    times = _measure(list(speakers), report) if len(names) > 1 else []
    reports = [each for each in distributed.gather_objects(report) if each is not None]
    return Examination(reports, times, compare(reports, needs, times))


def _gatherers(config: Any, *, is_main: bool) -> dict[str, Gatherer]:
    staging = getattr(getattr(config, "data", None), "staging_dir", None)
    gatherers: dict[str, Gatherer] = {
        "system": machine.system,
        "versions": software.versions,
        "source": software.source,
        "requirements": software.requirements,
        "gpus": machine.gpus,
        "processors": machine.processors,
        "limits": machine.limits,
        "variables": lambda: {"variables": software.variables(os.environ)},
        "own_disks": functools.partial(storage.own_disks, staging),
    }
    if config is None:
        return gatherers
    if isinstance(config, UserError):
        return gatherers | {"settings": functools.partial(_fail, config)}
    # It imports what runs import; a node on which that fails is examined all the same.
    data = importlib.import_module("spade_t5.launch.doctor.data")
    gatherers |= {name: functools.partial(getattr(data, name), config) for name in ("settings", "tokenizer", "text")}
    return gatherers | ({"checkpoints": functools.partial(data.checkpoints, config)} if is_main else {})


def _fail(error: Exception) -> dict[str, Any]:
    raise error


def _needs(config: Any, min_open_files: int | None) -> Needs:
    if config is None or isinstance(config, UserError):
        return Needs(min_open_files=min_open_files)
    staging = getattr(getattr(config, "data", None), "staging_dir", None)
    return Needs(
        loader_workers=config.training.loader_workers,
        min_open_files=min_open_files,
        run_dir=str(config.run_dir),
        staging_dir="" if staging is None else str(staging),
    )


def _examine_run_folder(run_dir: Path, speakers: dict[int, str], report: NodeReport | None) -> None:
    """Looks at the run folder from every node (a collective call); it is left as it was."""
    made: list[Path] = []
    problems: dict[str, str] = {}
    if distributed.is_main():
        facts, problems = gather({"run_folder": lambda: {"made": make_folder(run_dir)}})
        made = facts.get("made", [])
        _note(report, {}, problems)
    if not distributed.gather_objects(problems)[0]:
        seen, problems = sharing(run_dir, speakers)
        _note(report, seen, problems)
        is_seen = report is not None and not problems and (distributed.is_main() or not seen["run_unseen"])
        if is_seen:
            _note(report, *gather({"run_folder": functools.partial(storage.run_folder, run_dir)}))
        distributed.gather_objects(None)  # the folder stays until all are done
    remove_empty(made)


def _measure(speakers: list[int], report: NodeReport | None) -> list[CollectiveTime]:
    """Measures between nodes (a collective call); what cannot be measured is noted."""
    times: list[CollectiveTime] = []
    try:
        _note(report, measure_clocks(speakers), {})
    except RuntimeError as error:
        _note(report, {}, {"clocks": reason_of(error)})
    devices = [torch.device("cpu")]
    gpu = distributed.device()
    if all(distributed.gather_objects(gpu.type == "cuda" and (gpu.index or 0) < torch.cuda.device_count())):
        torch.cuda.set_device(gpu)
        devices.append(gpu)
    for device in devices:
        try:
            measured, facts = measure_network(speakers, device)
        except RuntimeError as error:
            _note(report, {}, {"network_nccl" if device.type == "cuda" else "network_gloo": reason_of(error)})
        else:
            times += measured
            _note(report, facts, {})
    return times


def _note(report: NodeReport | None, facts: dict[str, Any], problems: dict[str, str]) -> None:
    if report is not None:
        report.facts.update(facts)
        report.problems.update(problems)

"""Software, processors, GPUs and limits of the nodes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spade_t5.launch.doctor.checks.base import Check, Needs, Problem, others_than_usual, plain, same
from spade_t5.launch.doctor.report import NodeReport
from spade_t5.launch.doctor.software import LIBRARIES
from spade_t5.launch.doctor.units import gigabytes

MIN_FREE_GPU_SHARE = 0.9


def machine_checks() -> Iterator[Check]:
    """The checks, in the order of the table."""
    yield plain("host", "system", "host")
    yield plain("system", "system", "os", is_compared=True)
    yield plain("kernel", "system", "kernel", is_compared=True)
    yield same("python", "versions", "python", "install the same version on all nodes")
    for name in ("torch", "cuda", *LIBRARIES, "spade_t5"):
        yield same(name, "versions", name, "install the same version on all nodes")
    yield plain("revision", "source", "revision", show=lambda commit: commit[:12], is_compared=True)
    yield same("source code", "source", "source", "install the same code on all nodes", width=12)
    yield Check(
        title="requirements",
        asked="requirements",
        facts=("requirements",),
        show=lambda report: "met" if report.facts["requirements"] is None else "not met",
        judge=_requirements,
    )
    yield Check(
        title="GPUs",
        asked="gpus",
        facts=("gpus",),
        show=lambda r: _gpus(r.facts["gpus"]),
        judge=_judge_gpus,
        is_compared=True,
    )
    yield plain("driver", "gpus", "driver", is_compared=True)
    yield plain("CPU cores", "processors", "cores", is_compared=True)
    yield plain("memory", "processors", "memory_bytes", show=gigabytes)
    yield Check(
        title="open files",
        asked="limits",
        facts=("open_files",),
        show=lambda report: _limit(report.facts["open_files"]),
        judge=_open_files,
        is_compared=True,
    )
    yield Check(
        title="processes",
        asked="limits",
        facts=("processes", "threads_in_use"),
        show=lambda report: f"{_limit(report.facts['processes'])}, {report.facts['threads_in_use']} in use",
        judge=_processes,
    )
    yield Check(
        title="locked memory",
        asked="limits",
        facts=("locked_memory",),
        show=lambda report: _limit(report.facts["locked_memory"]),
        judge=_locked_memory,
        is_compared=True,
    )


def least_open_files(num_ranks: int, loader_workers: int) -> int:
    """Least limit of open files of a rank.

    Counted in runs on 2 and 4 ranks with and without loaders: the main rank held 38 descriptors, 5 for every other rank (a connection of each of three gloo
    groups, two of the store) and 14 for every loader process (pipes, and the tensors of two batches). The limit should be twice of what is held.
    """
    return 2 * (38 + 5 * (num_ranks - 1) + 14 * loader_workers)


def least_processes(num_ranks: int, loader_workers: int, cores: int) -> int:
    """Processes and threads of a node's ranks, twice of what was counted: 21 threads a rank beside those that compute, 4 a loader process."""
    return 2 * (num_ranks * (21 + 4 * loader_workers) + cores)


def _requirements(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        if report.facts["requirements"] is not None:
            value, _, remedy = report.facts["requirements"].partition("; ")
            yield Problem(report.node, value, remedy)


def _judge_gpus(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report, usual in others_than_usual(reports, lambda report: _gpus(report.facts["gpus"])):
        if _is_blind(report):  # which is said below
            continue
        yield Problem(
            report.node,
            f"{_gpus(report.facts['gpus'])}, and {_gpus(usual.facts['gpus'])} on {usual.node}",
            "take nodes of one kind, or see why GPUs are missing (nvidia-smi, CUDA_VISIBLE_DEVICES)",
        )
    for report in reports:
        found = report.facts["gpus"]
        if _is_blind(report):
            yield Problem(
                report.node, f"none, but there is NVIDIA's driver {report.facts['driver']}", _to_see_gpus(report)
            )
        if 0 < len(found) < report.num_ranks:
            yield Problem(
                report.node, f"{len(found)} for {report.num_ranks} processes", "start one process for each GPU"
            )
        for number, gpu in enumerate(found):
            if gpu["free_bytes"] < MIN_FREE_GPU_SHARE * gpu["total_bytes"]:
                yield Problem(
                    report.node,
                    f"GPU {number} has {gigabytes(gpu['free_bytes'])} of {gigabytes(gpu['total_bytes'])} free",
                    "end the processes that use it (nvidia-smi)",
                )


def _is_blind(report: NodeReport) -> bool:
    """Whether a node has a driver of GPUs, and PyTorch sees none."""
    return not report.facts["gpus"] and report.facts.get("driver") is not None


def _to_see_gpus(report: NodeReport) -> str:
    """What lets PyTorch see the GPUs of a node whose driver is there."""
    if report.facts.get("cuda", "") is None:
        return f"PyTorch {report.facts['torch']} is built without CUDA: install a build for CUDA"
    visible = report.facts.get("variables", {}).get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name GPUs that are there (nvidia-smi)"
    return "see whether nvidia-smi shows GPUs, whether the container is given them, and whether the driver is new enough for PyTorch's CUDA"


def _open_files(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    num_ranks = sum(report.num_ranks for report in reports)
    least = needs.min_open_files or least_open_files(num_ranks, needs.loader_workers)
    for report in reports:
        soft, hard = report.facts["open_files"]
        if soft is not None and soft < least:
            how = f"ulimit -n {least}" if hard is None or hard >= least else "raise nofile in /etc/security/limits.conf"
            yield Problem(report.node, f"a process may have {soft} open, and needs {least}", f"{how}, on each node")


def _processes(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        soft, _ = report.facts["processes"]
        least = least_processes(report.num_ranks, needs.loader_workers, report.facts.get("cores", 1))
        used = report.facts["threads_in_use"]
        if soft is not None and soft - used < least:
            yield Problem(
                report.node,
                f"{soft} processes and threads are allowed and {used} in use, the ranks need {least}",
                f"ulimit -u {used + least}, or raise nproc in /etc/security/limits.conf",
            )


def _locked_memory(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        soft, _ = report.facts["locked_memory"]
        if soft is not None:
            yield Problem(
                report.node,
                f"{soft:,} bytes, and there is InfiniBand, which locks its buffers",
                "ulimit -l unlimited, or memlock in /etc/security/limits.conf",
            )


def _gpus(gpus: Sequence[Mapping[str, Any]]) -> str:
    kinds = Counter(f"{gpu['name']} {gigabytes(gpu['total_bytes'])}" for gpu in gpus)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"


def _limit(limit: Sequence[int | None]) -> str:
    soft, hard = ("unlimited" if value is None else str(value) for value in limit)
    return soft if soft == hard else f"{soft} (hard {hard})"

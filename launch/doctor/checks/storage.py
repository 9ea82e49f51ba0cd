"""The run folder and the nodes' own disks."""

from collections.abc import Iterator, Sequence

from spade_t5.launch.doctor.checks.base import Check, Needs, Problem, plain
from spade_t5.launch.doctor.report import NodeReport
from spade_t5.launch.doctor.units import gigabytes, milliseconds, speed

MIN_TEMPORARY_BYTES = 1 << 30
MIN_SHARED_MEMORY_WITH_GPUS_BYTES = 1 << 30
"""What NCCL's documentation asks for in containers (docker run --shm-size=1g)."""


def storage_checks() -> Iterator[Check]:
    """The checks, in the order of the table."""
    yield Check(
        title="run folder",
        asked="run_folder",
        facts=("run_unseen",),
        show=lambda report: f"{'not ' if report.facts['run_unseen'] else ''}shared",
        judge=_sharing,
    )
    yield plain("  file system", "run_folder", "run_file_system", is_compared=True)
    yield Check(
        title="  semantics",
        asked="run_folder",
        facts=("run_semantics",),
        show=lambda report: "; ".join(report.facts["run_semantics"]) or "good",
        judge=_semantics,
    )
    yield Check(
        title="  free space",
        asked="run_folder",
        facts=("run_free_bytes",),
        show=lambda report: gigabytes(report.facts["run_free_bytes"]),
        judge=_run_space,
    )
    yield plain("  4 KiB to disk", "run_folder", "run_sync_seconds", show=milliseconds)
    yield plain("  large file", "run_folder", "run_bytes_per_second", show=speed)
    yield Check(
        title="temporary files",
        asked="own_disks",
        facts=("temporary", "temporary_free_bytes"),
        show=lambda report: f"{gigabytes(report.facts['temporary_free_bytes'])} free",
        judge=_temporary,
    )
    yield Check(
        title="shared memory",
        asked="own_disks",
        facts=("shared_memory_bytes",),
        show=lambda report: gigabytes(report.facts["shared_memory_bytes"]),
        judge=_shared_memory,
    )
    yield Check(
        title="staging folder",
        asked="own_disks",
        facts=("staging_free_bytes",),
        show=lambda report: f"{gigabytes(report.facts['staging_free_bytes'])} free",
        judge=_staging,
    )


def _sharing(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    main, *others = reports
    if main.rank != 0:  # it could not write, which is told
        return
    for report in others:
        if report.facts["run_unseen"]:
            value = f"{needs.run_dir} does not show what {main.node} wrote there"
        elif report.node in main.facts["run_unseen"]:
            value = f"{needs.run_dir} does not show on {main.node} what this node wrote there"
        else:
            continue
        yield Problem(report.node, value, "give a folder that all nodes share")


def _semantics(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        for broken in report.facts["run_semantics"]:
            yield Problem(
                report.node,
                f"{broken} in {needs.run_dir}, a {report.facts['run_file_system']} file system",
                "give a folder on another file system",
            )


def _run_space(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    main = reports[0]
    if main.rank != 0 or "checkpoint_bytes" not in main.facts:
        return
    size, held = main.facts["checkpoint_bytes"], main.facts["checkpoints_held"]
    count = max(held - main.facts["run_checkpoints"], 1)
    free = main.facts["run_free_bytes"]
    if free < count * size:
        yield Problem(
            main.node,
            f"{needs.run_dir} has {free:,} bytes free, {count} checkpoints more need {count * size:,}",
            "free space, choose another folder, or keep fewer checkpoints",
        )


def _temporary(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        free = report.facts["temporary_free_bytes"]
        if free < MIN_TEMPORARY_BYTES:
            yield Problem(
                report.node,
                f"{report.facts['temporary']} has {free:,} bytes free",
                f"free {gigabytes(MIN_TEMPORARY_BYTES)} for caches and compiled kernels, or set TMPDIR to another disk of the node",
            )


def _shared_memory(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        size = report.facts["shared_memory_bytes"]
        if report.facts.get("gpus") and size < MIN_SHARED_MEMORY_WITH_GPUS_BYTES:
            yield Problem(
                report.node,
                f"/dev/shm has {size:,} bytes, in which NCCL's processes share buffers",
                "start the container with --shm-size=1g, or mount /dev/shm larger",
            )


def _staging(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        free, needed = report.facts["staging_free_bytes"], report.facts.get("staging_needed_bytes", 0)
        if free < needed:
            yield Problem(
                report.node,
                f"{needs.staging_dir} has {free:,} bytes free, copies of the stores need {needed:,}",
                "free space, choose another disk, or set data.staging_dir=null",
            )

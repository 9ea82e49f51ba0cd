"""From reports to findings, without any node."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from spade_t5.launch.doctor.checks import Needs, compare
from spade_t5.launch.doctor.checks.machine import least_open_files
from spade_t5.launch.doctor.report import Finding, NodeReport
from spade_t5.launch.doctor.table import table
from spade_t5.testing import documented
from spade_t5.training.bandwidth import CollectiveTime

GPU = {"name": "NVIDIA H100 80GB HBM3", "total_bytes": 85_000_000_000, "free_bytes": 84_000_000_000}
FACTS: dict[str, Any] = {
    **{"host": "h", "os": "Debian", "kernel": "6.1", "python": "3.11.7", "torch": "2.13.0", "cuda": "13.0"},
    **{"triton": "3.7", "transformers": "5.23", "deepspeed": "0.19.8", "datasets": "5.2", "safetensors": "0.8"},
    **{"numpy": "2.4", "spade_t5": "0.1.0", "revision": "a" * 40, "source": "b" * 64, "requirements": None},
    **{"gpus": [GPU, GPU], "driver": "580.1", "cores": 64, "memory_bytes": 10**12},
    **{"open_files": [1024, 4096], "processes": [None, None], "threads_in_use": 500, "locked_memory": [None, None]},
    **{"run_unseen": [], "run_file_system": "nfs4", "run_semantics": [], "run_free_bytes": 10**12},
    **{"run_checkpoints": 0, "run_sync_seconds": 0.01, "run_bytes_per_second": 1e9},
    **{"temporary": "/tmp", "temporary_free_bytes": 10**11, "shared_memory_bytes": 10**11},
    **{"staging_free_bytes": 10**11, "staging_needed_bytes": 10**10},
    **{"settings": "c" * 64, "tokenizer": "d" * 64, "tokenizer_of_store": "d" * 64},
    **{"text": {"/data/store": {"hash": "e" * 64}}, "variables": {"NCCL_DEBUG": "WARN"}},
    **{"clock_offset": 0.01, "clock_uncertainty": 0.002, "round_trip": 0.004, "links_nccl": [1e10, 1e10]},
}
NEEDS = Needs(run_dir="/runs/base", staging_dir="/scratch")


def reports_of(*changes: dict[str, Any], problems: dict[str, str] | None = None) -> list[NodeReport]:
    """A report for each mapping of facts that are put over the usual ones, None to leave one out; `problems` are the last node's."""
    reports = []
    for number, changed in enumerate(changes):
        facts = {name: value for name, value in {**FACTS, **changed}.items() if value is not ...}
        reports.append(NodeReport(node=f"n{number}", rank=2 * number, num_ranks=2, facts=facts))
    reports[0].facts.update(checkpoint_bytes=10**10, checkpoints_held=3)
    if problems:
        reports[-1] = dataclasses.replace(reports[-1], problems=problems)
    return reports


def findings_of(
    *changes: dict[str, Any], needs: Needs = NEEDS, problems: dict[str, str] | None = None
) -> list[Finding]:
    found = compare(reports_of(*changes, problems=problems), needs).findings
    for finding in found:
        documented(str(finding))
    return found


def test_equal_nodes_have_nothing() -> None:
    assert findings_of({}, {}, {}) == []


@pytest.mark.parametrize(
    ("changed", "check", "value"),
    [
        ({"python": "3.12.1"}, "python", "3.12.1, and 3.11.7 on n0"),
        ({"deepspeed": None}, "deepspeed", "none, and 0.19.8 on n0"),
        ({"source": "f" * 64}, "source code", f"{'f' * 12}, and {'b' * 12} on n0"),
        (
            {"requirements": "a 1 is installed, but b needs a>=2; run c"},
            "requirements",
            "a 1 is installed, but b needs a>=2",
        ),
        ({"gpus": [GPU] * 3}, "GPUs", "3 x NVIDIA H100 80GB HBM3 85.0 GB, and 2 x NVIDIA H100 80GB HBM3 85.0 GB on n0"),
        ({"gpus": [GPU, {**GPU, "free_bytes": 10**10}]}, "GPUs", "GPU 1 has 10.0 GB of 85.0 GB free"),
        ({"open_files": [64, 64]}, "open files", f"a process may have 64 open, and needs {least_open_files(6, 0)}"),
        (
            {"processes": [600, 600]},
            "processes",
            "600 processes and threads are allowed and 500 in use, the ranks need 212",
        ),
        (
            {"locked_memory": [65536, 65536]},
            "locked memory",
            "65,536 bytes, and there is InfiniBand, which locks its buffers",
        ),
        ({"run_unseen": ["n0"]}, "run folder", "/runs/base does not show what n0 wrote there"),
        (
            {"run_semantics": ["a file can be made twice"]},
            "semantics",
            "a file can be made twice in /runs/base, a nfs4 file system",
        ),
        ({"temporary_free_bytes": 10**6}, "temporary files", "/tmp has 1,000,000 bytes free"),
        (
            {"shared_memory_bytes": 1 << 26},
            "shared memory",
            "/dev/shm has 67,108,864 bytes, in which NCCL's processes share buffers",
        ),
        (
            {"staging_free_bytes": 10**9},
            "staging folder",
            "/scratch has 1,000,000,000 bytes free, copies of the stores need 10,000,000,000",
        ),
        ({"settings": "f" * 64}, "settings", f"{'f' * 12}, and {'c' * 12} on n0"),
        ({"tokenizer": "f" * 64}, "tokenizer", f"{'f' * 12}, and the store was made with {'d' * 12}"),
        ({"tokenizer": "f" * 64, "tokenizer_of_store": ...}, "tokenizer", f"{'f' * 12}, and {'d' * 12} on n0"),
        ({"text": {"/data/store": {"hash": "f" * 64}}}, "text /data/store", f"{'f' * 12}, and {'e' * 12} on n0"),
        ({"text": {"/data/store": {"problem": "/data/store: missing"}}}, "text /data/store", "/data/store: missing"),
        ({"text": {}}, "text /data/store", "/data/store: not among the data of this node"),
        ({"variables": {"NCCL_DEBUG": "INFO"}}, "NCCL_DEBUG", "INFO, and WARN on n0"),
        ({"variables": {}}, "NCCL_DEBUG", "not set, and WARN on n0"),
        ({"clock_offset": -60.0}, "clock", "60.000 s behind the main node's, give or take 2.0 ms"),
        (
            {"links_nccl": [4e9, 4.9e9]},
            "link, nccl",
            "4.90 GB/s to its neighbours, and the median of the nodes is 10.00 GB/s",
        ),
    ],
)
def test_one_node_of_three_is_out_of_order(changed: dict[str, Any], check: str, value: str) -> None:
    (finding,) = findings_of({}, {}, changed)
    assert (finding.node, finding.check, finding.value) == ("n2", check, value)
    assert finding.remedy


@pytest.mark.parametrize("changed", [{"driver": "570.2"}, {"os": "Ubuntu"}, {"cores": 32}, {"revision": None}])
def test_what_differs_and_does_no_harm_is_marked(changed: dict[str, Any]) -> None:
    rows, findings = compare(reports_of({}, {}, changed), NEEDS)
    assert findings == []
    assert [row.is_marked for row in rows if row.verdict == "differs"] == [[False, False, True]]


@pytest.mark.parametrize("changed", [{"clock_offset": 6.0, "clock_uncertainty": 2.0}, {"links_nccl": [1e9, 1e10]}])
def test_what_is_not_certain_is_not_said(changed: dict[str, Any]) -> None:
    assert findings_of({}, {}, changed) == []


def test_processes_need_a_gpu_each() -> None:
    (finding,) = findings_of({"gpus": [GPU]}, {"gpus": [GPU]})
    assert (finding.node, finding.value) == ("", "1 for 2 processes")


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None}, "PyTorch 2.13.0+cpu is built without CUDA"),
        ({"variables": {"CUDA_VISIBLE_DEVICES": ""}}, "CUDA_VISIBLE_DEVICES is '': unset it"),
        ({}, "see whether nvidia-smi shows GPUs"),
        ({"cuda": ..., "variables": ...}, "see whether nvidia-smi shows GPUs"),
    ],
)
def test_gpus_that_pytorch_does_not_see_are_found(changed: dict[str, Any], remedy: str) -> None:
    (finding,) = findings_of({"gpus": [], **changed})
    assert (finding.check, finding.value) == ("GPUs", "none, but there is NVIDIA's driver 580.1")
    assert finding.remedy.startswith(remedy)
    assert findings_of({"gpus": [], "driver": None, **changed}) == []
    of_two = [finding for finding in findings_of({}, {"gpus": [], **changed}) if finding.check == "GPUs"]
    assert [(finding.node, finding.remedy) for finding in of_two] == [
        ("n1", findings_of({"gpus": [], **changed})[0].remedy)
    ]


def test_the_first_node_may_be_the_odd_one() -> None:
    (finding,) = findings_of({"torch": "2.12.0"}, {}, {})
    assert (finding.node, finding.value) == ("n0", "2.12.0, and 2.13.0 on n1")


def test_what_is_wrong_everywhere_is_said_once() -> None:
    (finding,) = findings_of({"open_files": [64, 64]}, {"open_files": [64, 64]})
    assert finding.node == ""
    assert str(finding).startswith("all nodes: open files: ")


def test_the_main_node_may_not_see_what_another_wrote() -> None:
    (finding,) = findings_of({"run_unseen": ["n1"]}, {})
    assert (finding.node, finding.value) == ("n1", "/runs/base does not show on n0 what this node wrote there")


def test_room_for_checkpoints() -> None:
    (finding,) = findings_of({"run_free_bytes": 29 * 10**9}, {})
    assert finding.value == "/runs/base has 29,000,000,000 bytes free, 3 checkpoints more need 30,000,000,000"
    assert findings_of({"run_free_bytes": 29 * 10**9, "run_checkpoints": 1}, {}) == []
    (finding,) = findings_of({"run_free_bytes": 9 * 10**9, "run_checkpoints": 9}, {})
    assert "1 checkpoints more need 10,000,000,000" in finding.value


def test_open_files_grow_with_the_run() -> None:
    assert findings_of({}, {}, needs=dataclasses.replace(NEEDS, loader_workers=100))
    assert findings_of({}, {}, needs=dataclasses.replace(NEEDS, loader_workers=100, min_open_files=1024)) == []
    assert least_open_files(512, 8) > 4096


def test_what_cannot_be_looked_at_is_said_and_hides_nothing_else() -> None:
    lost = dict.fromkeys(("open_files", "processes", "threads_in_use", "locked_memory"), ...)
    found = findings_of({}, {**lost, "torch": "2.12.0"}, problems={"limits": "no answer within 60 s"})
    assert [(finding.node, finding.check, finding.value) for finding in found] == [
        ("n1", "torch", "2.12.0, and 2.13.0 on n0"),
        ("n1", "open files", "no answer within 60 s"),
    ]


def test_one_reason_is_told_once() -> None:
    reason = "/data/store/manifest.json: missing"
    lost = {"text": {"/data/store": {"problem": reason}}, "tokenizer": ...}
    (finding,) = findings_of({}, lost, problems={"tokenizer": reason, "checkpoints": reason})
    assert (finding.node, finding.check, finding.value) == ("n1", "text /data/store", reason)


def test_a_main_node_that_cannot_write_is_no_news_of_the_others() -> None:
    reports = reports_of({"run_unseen": ..., "run_free_bytes": ...}, {"run_free_bytes": 1}, {})
    reports[0].problems["run_folder"] = "/runs/base cannot be made (Read-only file system)"
    (finding,) = compare(reports, NEEDS).findings
    assert (finding.node, finding.check) == ("n0", "run folder")


def test_the_table() -> None:
    reports = reports_of({}, {"torch": "2.12.0"})
    times = [
        CollectiveTime(name="all_reduce", backend="nccl", num_ranks=4, num_bytes=8, seconds=2e-5),
        CollectiveTime(name="all_reduce", backend="nccl", num_ranks=4, num_bytes=64 << 20, seconds=1e-3),
    ]
    rows, _ = compare(reports, NEEDS, times)
    lines = list(table(["n0", "n1"], rows))
    assert lines[0].split() == ["check", "n0", "n1"]
    assert next(line for line in lines if line.startswith("torch")).split() == ["torch", "2.13.0", "2.12.0*", "BAD"]
    assert [line.split()[3:] for line in lines[-2:]] == [
        ["B", "20", "us", "="],
        ["MiB", "67.11", "GB/s,", "bus", "100.66", "GB/s", "="],
    ]


def test_every_row_is_explained() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "doctor.md").read_text(encoding="utf-8")
    times = [CollectiveTime(name="all_reduce", backend="gloo", num_ranks=2, num_bytes=8, seconds=1e-4)]
    rows, _ = compare(reports_of({}, {}), NEEDS, times)
    titles = {row.title.strip().split(",")[0].removesuffix(" /data/store") for row in rows}
    assert not [title for title in titles if f"`{title}`" not in page]


def test_of_many_nodes_the_table_shows_those_that_matter() -> None:
    names = [f"n{number}" for number in range(64)]
    rows, _ = compare(reports_of(*({"torch": "2.12.0"} if number == 40 else {} for number in range(64))), NEEDS)
    header, *_, last = table(names, rows)
    assert header.split() == ["check", "n0", "n1", "n2", "n3", "n4", "n40"]
    assert last == "58 more nodes are not shown; --json has all"

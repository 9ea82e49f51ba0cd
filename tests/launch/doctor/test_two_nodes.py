"""Two real processes stand for two nodes; one thing is wrong on the second, and that is found and nothing else."""

import ctypes
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5.launch.cli import main
from spade_t5.testing import RankGroup, documented, launch_ranks
from spade_t5.testing.disks import small_disk
from spade_t5.training import shared_folder

CLONE_NEWNS = 0x20000
CORPUS = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]

Doctor = Callable[..., tuple[list[int | None], dict[str, Any], RankGroup]]


def be_a_node(torch_version: str = "", clock: float = 0, open_files: int = 0, mounts: Mapping[str, str] = {}) -> None:
    """Gives the rank a node's name; the second node gets another version, clock, limit, or other folders at the same place."""
    os.environ["SPADE_T5_NODE"] = f"node-{os.environ['RANK']}"
    shared_folder.PATIENCE_SECONDS = 0.5
    if os.environ["RANK"] == "0":
        return
    if torch_version:
        torch.__version__ = torch_version
    if clock:
        true_time = time.time
        time.time = lambda: true_time() + clock
    if open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    if mounts:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        for place, source in mounts.items():
            subprocess.run(["mount", "--bind", source, place], check=True)


def can_mount() -> bool:
    """Whether a process may have mounts of its own."""
    return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="mounting is not permitted here")


@pytest.fixture
def doctor(tmp_path: Path, pretrain_words: Callable[..., list[str]]) -> Doctor:
    """Runs doctor on two nodes for a small run; returns the exit codes, what it printed as JSON, and the group."""

    def run(
        run_dir: Path | None = None, *words: str, **breaks: Any
    ) -> tuple[list[int | None], dict[str, Any], RankGroup]:
        _, *run_words = pretrain_words(run_dir or tmp_path / "run", "training.loader_workers=4", *words)
        with launch_ranks(
            ["doctor", *run_words, "--json"],
            num_ranks=2,
            log_dir=tmp_path / "logs",
            hook=be_a_node,
            hook_arguments=breaks,
        ) as group:
            codes = group.wait()
        assert group.stdout(0), group.errors()
        return codes, json.loads(group.stdout(0)), group

    return run


def only_finding(result: tuple[list[int | None], dict[str, Any], RankGroup]) -> dict[str, str]:
    """The one finding there must be, which the failure cookbook knows."""
    codes, output, group = result
    assert codes == [1, 1], group.errors()
    assert len(output["findings"]) == 1, output["findings"]
    finding = output["findings"][0]
    documented(f"{finding['node'] or 'all nodes'}: {finding['check']}: {finding['value']}; {finding['remedy']}")
    return finding


def test_a_healthy_pair(doctor: Doctor, tmp_path: Path) -> None:
    codes, output, group = doctor()
    assert codes == [0, 0], group.errors()
    assert output["findings"] == []
    assert [node["node"] for node in output["nodes"]] == ["node-0", "node-1"]
    assert not any(node["problems"] for node in output["nodes"])
    assert [(each["name"], each["num_ranks"]) for each in output["collectives"]] == [("all_reduce", 2)] * 2
    facts = output["nodes"][1]["facts"]
    assert abs(facts["clock_offset"]) <= facts["clock_uncertainty"] + 0.01
    assert len(facts["links_gloo"]) == 2
    assert not (tmp_path / "run").exists()  # it is left as it was


def test_another_torch_version(doctor: Doctor) -> None:
    finding = only_finding(doctor(torch_version="2.98.1"))
    assert (finding["node"], finding["check"]) == ("node-1", "torch")
    assert finding["value"] == f"2.98.1, and {torch.__version__} on node-0"
    assert "install the same version" in finding["remedy"]


@pytest.mark.parametrize(("seconds", "side"), [(60.0, "ahead of"), (-60.0, "behind")])
def test_a_clock_that_is_off_by_a_minute(doctor: Doctor, seconds: float, side: str) -> None:
    finding = only_finding(doctor(clock=seconds))
    assert (finding["node"], finding["check"]) == ("node-1", "clock")
    assert abs(float(finding["value"].split(" s ")[0]) - 60) < 1
    assert side in finding["value"]
    assert "NTP" in finding["remedy"]


def test_too_few_open_files(doctor: Doctor) -> None:
    finding = only_finding(doctor(open_files=128))
    assert (finding["node"], finding["check"]) == ("node-1", "open files")
    assert "may have 128 open" in finding["value"]
    assert "nofile" in finding["remedy"]


def test_a_limit_that_is_asked_for(doctor: Doctor) -> None:
    least = resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1
    finding = only_finding(doctor(None, "--min-open-files", str(least)))
    assert (finding["node"], finding["check"]) == ("", "open files")


@needs_mounts
def test_a_folder_that_is_not_shared(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with small_disk(tmp_path / "elsewhere", "64m") as elsewhere:
        finding = only_finding(doctor(mounts={str(tmp_path / "run"): str(elsewhere)}))
        assert (finding["node"], finding["check"]) == ("node-1", "run folder")
        assert str(tmp_path / "run") in finding["value"]
        assert "give a folder that all nodes share" in finding["remedy"]
        assert not list(elsewhere.iterdir())
    assert not list((tmp_path / "run").iterdir())


@needs_mounts
def test_a_folder_that_is_missing_on_a_node(doctor: Doctor, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    with small_disk(tmp_path / "elsewhere", "64m") as elsewhere:
        finding = only_finding(doctor(runs / "run", mounts={str(runs): str(elsewhere)}))
    assert (finding["node"], finding["check"]) == ("node-1", "run folder")
    assert finding["value"] == f"{runs / 'run'} cannot be written (No such file or directory)"


@needs_mounts
def test_another_tokenizer(doctor: Doctor, tmp_path: Path, store: Path) -> None:
    other = tmp_path / "tokenizer"
    assert main(["tokenizer", *CORPUS, "vocab_size=500", "num_sentinels=40", f"out={other}"]) == 0
    finding = only_finding(doctor(mounts={str(store / "tokenizer"): str(other)}))
    assert (finding["node"], finding["check"]) == ("node-1", "tokenizer")
    assert "the store was made with" in finding["value"]
    assert "copy the store's own tokenizer" in finding["remedy"]


@needs_mounts
def test_a_store_that_is_missing_on_a_node(doctor: Doctor, tmp_path: Path, store: Path) -> None:
    (tmp_path / "empty").mkdir()
    finding = only_finding(doctor(mounts={str(store): str(tmp_path / "empty")}))
    assert (finding["node"], finding["check"]) == ("node-1", f"text {store}")
    assert finding["value"].startswith(f"{store}: not a token store")


def test_too_little_disk(doctor: Doctor, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1m") as disk:
        finding = only_finding(doctor(disk / "run"))
        assert not list(disk.iterdir())
    assert (finding["node"], finding["check"]) == ("node-0", "free space")
    assert str(tmp_path / "small" / "run") in finding["value"]
    assert "free space" in finding["remedy"]

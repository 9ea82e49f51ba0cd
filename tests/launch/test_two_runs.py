"""Real runs that want the same folder, are killed in it, or lose it."""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.checkpoint import list_checkpoints
from spade_t5.checkpoint.manifest import read_manifest
from spade_t5.testing import RankGroup, documented, launch_ranks

LONG = [
    "training.deepspeed={zero_stage: 1}",
    "training.schedule={name: constant}",
    "training.eval_every_steps=null",
    "training.save_every_steps=2",
]
Words = Callable[..., list[str]]


def wait_for(condition: Callable[[], bool], group: RankGroup) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert group.is_running(), group.stderr(0)
        assert time.monotonic() < until, group.stderr(0)
        time.sleep(0.05)


def shared_memory() -> set[str]:
    """Buffers of DeepSpeed's own all-reduce, which its killed ranks would leave behind."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed*")}


def test_one_of_two_runs_trains_and_a_killed_one_is_succeeded(tmp_path: Path, pretrain_words: Words) -> None:
    run = tmp_path / "run"
    words = [*pretrain_words(run, *LONG), "training.steps=100000"]
    buffers = shared_memory()
    with launch_ranks(words, num_ranks=2, log_dir=tmp_path / "first") as first:
        wait_for(lambda: bool(list_checkpoints(run / "checkpoints")), first)
        lease = json.loads((run / "lease.json").read_text())
        assert lease["pid"] == first.ranks[0]
        assert read_manifest(list_checkpoints(run / "checkpoints")[0])["lease"] == lease["token"]
        with launch_ranks(words, num_ranks=2, log_dir=tmp_path / "second") as second:
            assert second.wait() == [2, 2]
        message = f"spade-t5 pretrain: run_dir: {run} is in use by {socket.gethostname()}:{first.ranks[0]}; wait for"
        assert message in second.stderr(0)
        documented(second.stderr(0))
        assert first.is_running()
        first.kill("all")
        first.wait()
    assert json.loads((run / "lease.json").read_text())["token"] == lease["token"]
    last = int(list_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))
    words = [*pretrain_words(run, *LONG), f"training.steps={last + 3}"]
    with launch_ranks(words, num_ranks=2, log_dir=tmp_path / "third") as third:
        assert third.wait() == [0, 0], third.stderr(0)
    assert f"took over the lease of {socket.gethostname()}:{first.ranks[0]}, which is gone" in third.stderr(0)
    assert f"resumed from {run / 'checkpoints' / f'step-{last:08d}'} at step {last}" in third.stderr(0)
    for rank in (0, 1):
        assert f"at step {last}" in (run / "logs" / f"rank-{rank:05d}.log").read_text()
    assert read_manifest(list_checkpoints(run / "checkpoints")[-1])["lease"] != lease["token"]
    assert not (run / "lease.json").exists()
    assert shared_memory() == buffers


@pytest.mark.parametrize("loss", ["taken over", "taken over between saves", "folder moved"])
def test_a_run_that_loses_its_folder_ends_and_publishes_nothing_more(
    loss: str, tmp_path: Path, pretrain_words: Words
) -> None:
    run = tmp_path / "run"
    words = [*pretrain_words(run, *LONG), "training.steps=100000"]
    if loss == "taken over between saves":
        words.append("training.save_every_steps=null")
    with launch_ranks(words, num_ranks=2, log_dir=tmp_path / "logs") as group:
        sign = run / "metrics.jsonl" if "between" in loss else run / "checkpoints" / "step-00000002"
        wait_for(sign.exists, group)
        if loss == "folder moved":
            run.rename(tmp_path / "moved")
        else:
            lease = json.loads((run / "lease.json").read_text())
            (tmp_path / "lease").write_text(json.dumps(lease | {"host": "elsewhere", "pid": 7, "token": "other"}))
            os.replace(tmp_path / "lease", run / "lease.json")
        assert group.wait() == [1, 1], group.stderr(0)
    err = group.stderr(0)
    last = err.splitlines()[-1]
    assert last.startswith("spade-t5 pretrain: ")
    documented(last)
    if loss == "folder moved":
        assert not run.exists()
        documented(next(line for line in err.splitlines() if line.startswith("tensorboard: ")))
    else:
        assert "Traceback" not in err
        assert f"lease: elsewhere:7 has taken over {run}, so nothing more is saved here" in err
        assert json.loads((run / "lease.json").read_text())["token"] == "other"
        assert {read_manifest(path)["lease"] for path in list_checkpoints(run / "checkpoints")} <= {lease["token"]}

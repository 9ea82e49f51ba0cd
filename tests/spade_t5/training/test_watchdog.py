"""Hanging ranks, as processes that hang: each is noticed, named and ended, and the stacks of all are there."""

import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from spade_t5.data.lines import RETRY_PAUSES_SECONDS
from spade_t5.testing import call_on_ranks, documented
from spade_t5.training import distributed, watchdog
from spade_t5.training.outcome import read_outcomes, record_outcomes_in
from spade_t5.training.watchdog import Process, Report, TimeoutsConfig, Watchdog, describe_hang


def hang(folder: str, how: str, culprit: int) -> None:
    """What a rank does: meets the others, trains for a moment, and then hangs or waits for the rank that does."""
    logs = Path(folder)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the trainer takes it for a request, and goes on
    record_outcomes_in(logs.parent)
    distributed.join(300)
    with Watchdog(TimeoutsConfig(compile_seconds=60, step_seconds=2), logs) as dog:
        for step in range(3):
            dog.enter("data", step)
            dog.enter("step", step)
            distributed.barrier()
        dog.enter("data", 3)
        if distributed.rank() == culprit:
            if how == "loader":
                time.sleep(120)
            dog.enter("step", 3)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "holding the interpreter":
                ctypes.PyDLL(None).sleep(120)
            time.sleep(120)
        dog.enter("step", 3)
        distributed.barrier()


@pytest.mark.parametrize(
    ("how", "culprit", "deed"),
    [
        ("loader", 1, r"waits for its training rows in data of step 3 for \d+\.\d s; the others wait for it"),
        ("computing", 0, r"does not get on in step of step 3 for \d+\.\d s; the others wait for it"),
        ("stopped", 0, "did not answer in time: stopped, or its machine is gone"),  # which holds the store
        ("holding the interpreter", 1, "did not answer in time: stopped, or its machine is gone; the others"),
    ],
)
def test_a_hanging_rank_is_named_and_every_rank_ends(how: str, culprit: int, deed: str, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with pytest.raises(AssertionError) as failure:
        call_on_ranks(
            hang,
            {"folder": str(logs), "how": how, "culprit": culprit},
            num_ranks=2,
            log_dir=tmp_path,
            timeout_seconds=60,
        )
    assert re.match(r"exit codes \[-?\d+, -?\d+\]", str(failure.value)), "all ended by themselves"
    other = 1 - culprit
    outcomes = {outcome.rank: outcome for outcome in read_outcomes(tmp_path)}
    message = outcomes[other].message
    assert re.match(rf"hanging: rank {culprit} \({socket.gethostname()}, pid \d+\) {deed}", message), message
    assert outcomes[other].code == 1
    assert not outcomes[other].is_consequence
    documented(message)
    own, others = ((logs / f"rank-{rank:05d}.stacks.txt").read_text() for rank in (culprit, other))
    assert "distributed.py" in others, "where it waited"
    assert "in hang" in own, "where it hung"


def be_suspended(folder: str) -> None:
    """A rank that is stopped for longer than a step may take, and goes on."""
    watchdog.SUSPENDED_SECONDS = 1
    with Watchdog(TimeoutsConfig(step_seconds=4), Path(folder)) as dog:
        dog.enter("step", 1)
        with subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"]):
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2 * watchdog.POLL_SECONDS)
        dog.enter("step", 2)


def test_time_in_which_a_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    call_on_ranks(be_suspended, {"folder": str(tmp_path / "logs")}, num_ranks=1, log_dir=tmp_path)


def test_one_rank_collects_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0)
    dog = Watchdog(TimeoutsConfig(), tmp_path)
    dog._processes = [Process(host="node", pid=rank, started="1") for rank in range(3)]
    dog._store = dist.HashStore()
    for rank in (0, 2):
        dog._store.set(f"watchdog/{rank}", json.dumps(asdict(report("step", in_collective=True))))
    assert {rank: Report(**fields) for rank, fields in dog._collect().items()} == {
        rank: report("step", in_collective=True) for rank in (0, 2)
    }
    assert dog._answer_seconds == pytest.approx(0.03), "more ranks have more time"


def test_a_healthy_run_arms_the_last_resort_rarely_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armings = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **options: armings.append(seconds))
    with Watchdog(TimeoutsConfig(), tmp_path / "logs") as dog:
        for step in range(1000):
            dog.enter("data", step)
            dog.enter("step", step)
        dog.enter("save", 1000)
    assert len(armings) <= 4, "each costs fifty microseconds"
    assert not (tmp_path / "logs").exists()


def hang_alone(folder: str) -> None:
    """One process without a group."""
    with Watchdog(TimeoutsConfig(compile_seconds=1), Path(folder)):
        time.sleep(120)


def test_one_process_alone(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[1\]") as failure:
        call_on_ranks(hang_alone, {"folder": str(tmp_path / "logs")}, num_ranks=1, log_dir=tmp_path)
    assert "hanging: rank 0" in str(failure.value)
    documented(next(line for line in str(failure.value).splitlines() if "hanging:" in line))
    assert "in hang_alone" in (tmp_path / "logs" / "rank-00000.stacks.txt").read_text()


def test_stacks_on_demand(tmp_path: Path) -> None:
    with Watchdog(TimeoutsConfig(), tmp_path):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert "in test_stacks_on_demand" in (tmp_path / "rank-00000.stacks.txt").read_text()


def test_the_limit_of_a_step_follows_the_slowest_of_the_last_hundred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time, sleep=time.sleep, strftime=time.strftime)
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(TimeoutsConfig(compile_seconds=400), tmp_path) as dog:
        assert dog.limit_seconds("step") == 162 > sum(RETRY_PAUSES_SECONDS) + 60, (
            "remote rows are tried again for so long"
        )
        now += 50
        dog.enter("data", 1)
        assert dog.limit_seconds("step") == 250, "the first step counts"
        now += 30
        dog.enter("step", 1)
        now += 15
        dog.enter("evaluation", 1)
        now += 300
        dog.enter("data", 2)
        assert dog.limit_seconds("step") == 250, "evaluations do not"
        for step in range(2, 101):
            dog.enter("step", step)
            now += 35
            dog.enter("data", step + 1)
        assert dog.limit_seconds("step") == 225, "5 x the 45 s of the step with its wait for rows"
        dog.enter("step", 101)
        now += 35
        dog.enter("data", 102)
        assert dog.limit_seconds("step") == 175
        now += 99
        dog.enter("data", 103)
        assert dog.limit_seconds("step") == 400, "no longer than the first step may take"
        assert [dog.limit_seconds(phase) for phase in ("compile", "evaluation", "save")] == [400, 600, 1800]


def report(phase: watchdog.Phase, *, in_collective: bool) -> Report:
    return Report(phase=phase, step=7, seconds=61.0, in_collective=in_collective)


def test_who_is_named() -> None:
    processes = [Process(host=f"node{rank // 2}", pid=100 + rank, started="1") for rank in range(8)]
    waiting = {rank: report("step", in_collective=True) for rank in range(8)}
    everyone = describe_hang(waiting, [], processes)
    assert everyone == ("all 8 ranks wait for each other in step of step 7: the network, or a device, does not get on")
    documented(f"hanging: {everyone}; the stacks")
    assert describe_hang({**waiting, 5: report("data", in_collective=False)}, [], processes).startswith(
        "rank 5 (node2, pid 105) waits for its training rows in data of step 7 for 61.0 s"
    )
    assert describe_hang({**waiting, 6: report("save", in_collective=False)}, [], processes).startswith(
        "rank 6 (node3, pid 106) does not get on in save of step 7 for 61.0 s"
    )
    assert describe_hang({0: waiting[0]}, [1, 2, 3, 4, 5, 6, 7], processes).startswith(
        "rank 1 (node0, pid 101), rank 2 (node1, pid 102), rank 3 (node1, pid 103), rank 4 (node2, pid 104) and 3 more did not answer"
    )


@pytest.mark.parametrize("name", ["compile_seconds", "step_seconds", "evaluation_seconds", "save_seconds"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: 0 must be positive"):
        TimeoutsConfig(**{name: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_flight_recorder_of_nccl_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    try:
        dist.all_reduce(torch.ones(3, device="cuda"))
        torch.cuda.synchronize()
        recording = watchdog._nccl_flight_recording()
    finally:
        dist.destroy_process_group()
    assert recording is not None
    assert [entry["profiling_name"] for entry in json.loads(recording)["entries"]] == ["nccl:all_reduce"]

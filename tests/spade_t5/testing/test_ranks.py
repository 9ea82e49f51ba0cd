"""The groups of ranks that fault tests run on: they end as torchrun's do, and nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spade_t5.testing.ranks import call_on_ranks, launch_ranks


def facts(factor: int) -> dict[str, Any]:
    return {
        "rank": int(os.environ["RANK"]),
        "world": os.environ["WORLD_SIZE"],
        "product": int(os.environ["LOCAL_RANK"]) * factor,
        "is_preloaded": "deepspeed" in sys.modules,
        "note": os.environ.get("NOTE"),
    }


def fail(on_rank: int) -> None:
    if int(os.environ["RANK"]) == on_rank:
        raise RuntimeError("broken on purpose")
    time.sleep(60)


def sleep_with_child(seconds: float) -> None:
    subprocess.Popen(["sleep", str(seconds)])
    print("asleep", flush=True)
    time.sleep(seconds)


def end_with(code: int) -> None:
    sys.exit(code)


def wait_for_output(group: Any) -> None:
    deadline = time.monotonic() + 30
    while not all("asleep" in group.stdout(rank) for rank in range(len(group.ranks))):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_function_on_three_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTE", "as in this process")
    results = call_on_ranks(facts, {"factor": 10}, num_ranks=3, log_dir=tmp_path)
    assert [result["product"] for result in results] == [0, 10, 20]
    assert all(result["world"] == "3" and result["is_preloaded"] for result in results)
    assert results[0]["note"] == "as in this process"


def test_a_rank_that_fails_ends_the_others_and_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[-15, 1\](.|\n)*broken on purpose"):
        call_on_ranks(fail, {"on_rank": 1}, num_ranks=2, log_dir=tmp_path)


@pytest.mark.parametrize("what", [0, "launcher", "all"])
def test_nothing_is_left_of_a_killed_group(what: Any, tmp_path: Path) -> None:
    with launch_ranks(
        [], num_ranks=2, log_dir=tmp_path, hook=sleep_with_child, hook_arguments={"seconds": 60}
    ) as group:
        wait_for_output(group)
        assert len(group.living()) == 5
        group.kill(what)
        codes = group.wait(timeout_seconds=30)
        assert codes == ([-9, -15] if what == 0 else [None, None])
        time.sleep(0.5)
        # Children of ranks have no one to take them along, and living() finds them.
        assert list(group.living().values()) == ([] if what == "all" else ["sleep", "sleep"])
    group.assert_gone()


def test_signals_reach_the_ranks_and_commands_give_their_codes(tmp_path: Path) -> None:
    with launch_ranks(
        [], num_ranks=2, log_dir=tmp_path, hook=sleep_with_child, hook_arguments={"seconds": 60}
    ) as group:
        wait_for_output(group)
        group.kill("launcher", signal.SIGTERM)
        assert group.wait(timeout_seconds=30) == [-15, -15]
    with launch_ranks(["verify", "/nowhere"], num_ranks=1, log_dir=tmp_path) as group:
        assert group.wait() == [2]
        assert "/nowhere" in group.stderr(0)
    with launch_ranks([], num_ranks=2, log_dir=tmp_path, hook=end_with, hook_arguments={"code": 75}) as group:
        assert group.wait() == [75, 75]

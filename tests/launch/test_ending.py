"""How a start of all ranks ended is read from what each machine tells."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from spade_t5.launch.ending import Ending, GroupEnd, ending_of
from spade_t5.training.outcome import Outcome

LOGS = Path("/logs")


def outcome(rank: int, code: int = 0, at: float = 1.0, *, is_consequence: bool = False) -> Outcome:
    return Outcome(rank=rank, code=code, message=f"rank {rank} says", seconds=at, is_consequence=is_consequence)


def group(*outcomes: Outcome, agent_code: int = 0, codes: dict[int, int] | None = None, **flags: Any) -> GroupEnd:
    return GroupEnd(
        num_ranks=1,
        outcomes=outcomes,
        agent_code=agent_code,
        reported_codes=codes or {},
        agent_log="/logs/torchrun.log",
        **flags,
    )


def end(*groups: GroupEnd, is_stop_requested: bool = False, has_lost: bool = False) -> Ending:
    through_json = [GroupEnd.from_json(json.loads(json.dumps(one.as_json()))) for one in groups]
    return ending_of(through_json, logs=LOGS, is_stop_requested=is_stop_requested, grace_seconds=20, has_lost=has_lost)


def test_all_is_well_when_every_machine_says_so() -> None:
    assert end(group(outcome(0)), group(outcome(1))) == Ending(0, "")
    assert end(group(outcome(0, 75)), group(outcome(1, 75))) == Ending(75, "rank 0 says")


def test_the_failure_that_came_first_counts_wherever_it_was() -> None:
    late, early = group(outcome(0, 1, at=5), agent_code=1), group(outcome(1, 1, at=4), agent_code=1)
    assert end(late, early) == Ending(1, "rank 1: rank 1 says; its log is /logs/rank-00001.err")
    lost_peer = group(outcome(0, 1, at=3, is_consequence=True), agent_code=1)
    assert end(lost_peer, early).message.startswith("rank 1: ")
    refused = group(outcome(1, 2, at=4), agent_code=2)
    assert end(lost_peer, refused) == Ending(2, "rank 1 says")


def test_a_killed_rank_is_named_and_not_those_that_were_ended_for_it() -> None:
    killed = group(agent_code=1, codes={1: -signal.SIGKILL})
    for others in (
        group(agent_code=-signal.SIGKILL, was_ended=True),
        group(outcome(0, 1, at=3, is_consequence=True), agent_code=1, codes={0: 1}),
    ):
        assert end(others, killed) == Ending(1, "rank 1 was killed by SIGKILL; its log is /logs/rank-00001.err")
    agent = group(agent_code=-signal.SIGTERM)
    assert end(group(agent_code=-signal.SIGKILL, was_ended=True), agent) == Ending(
        1, "torchrun was killed by SIGTERM, and the ranks with it"
    )


@pytest.mark.parametrize("is_stop_requested", [False, True])
def test_a_lost_machine_is_a_fault_unless_it_was_to_stop(is_stop_requested: bool) -> None:
    ended = group(agent_code=-signal.SIGKILL, was_ended=True)
    assert end(ended, is_stop_requested=is_stop_requested, has_lost=True).code == (75 if is_stop_requested else 1)
    failed = group(outcome(0, 2), agent_code=2)
    assert end(failed, is_stop_requested=is_stop_requested, has_lost=True).code == 2


def test_out_of_grace_on_one_machine_is_said() -> None:
    slow = group(agent_code=-signal.SIGKILL, is_out_of_grace=True)
    ending = end(group(outcome(0, 75)), slow, is_stop_requested=True)
    assert ending.code == 75
    assert "did not end within the grace of 20 s" in ending.message

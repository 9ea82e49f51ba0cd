"""How a start of all ranks ended, from what their files and their torchrun say."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from spade_t5.launch.cli import EXIT_FAULT, EXIT_USER_ERROR
from spade_t5.launch.rank import output_files
from spade_t5.training.outcome import Outcome
from spade_t5.training.stopping import EXIT_STOPPED

GO_ON = "start the same command again to go on"


class Ending(NamedTuple):
    """How a start of all ranks ended."""

    code: int
    message: str
    """One line; empty if there is nothing to say."""
    is_final: bool = False
    """Whether another start would end likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEnd:
    """How the ranks of one machine ended."""

    num_ranks: int
    """How many were started."""
    outcomes: Sequence[Outcome]
    """What they said themselves, in rank order."""
    agent_code: int
    """Exit code of their torchrun, minus the signal that killed it."""
    reported_codes: Mapping[int, int]
    """Exit codes by rank as torchrun's closing report has them, the first failure first; minus the signal that killed a rank."""
    agent_log: str
    """File of what torchrun said."""
    is_out_of_grace: bool = False
    """They were killed because they did not end in time after a request to stop."""
    was_ended: bool = False
    """They were killed because ranks elsewhere had failed."""

    def as_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_json`, behind a round trip through JSON."""
        return cls(
            **{
                **values,
                "outcomes": [Outcome(**outcome) for outcome in values["outcomes"]],
                "reported_codes": {int(rank): code for rank, code in values["reported_codes"].items()},
            }
        )


def ending_of(
    groups: Sequence[GroupEnd], *, logs: Path, is_stop_requested: bool, grace_seconds: float, has_lost: bool = False
) -> Ending:
    """How a start of all ranks ended.

    Args:
        groups: the ends of the machines that could tell.
        logs: folder of the ranks' output.
        is_stop_requested: whether the ranks were asked to stop.
        grace_seconds: how long they had for it.
        has_lost: whether there are machines that could not tell, which was said already.
    """
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    own = sorted((o for o in outcomes if not o.is_consequence), key=lambda outcome: outcome.seconds)
    failed = [outcome for outcome in own if outcome.code not in (0, EXIT_STOPPED)]
    if failed:
        return _failure(failed[0], logs)
    if any(group.is_out_of_grace for group in groups):
        return Ending(
            EXIT_STOPPED,
            f"did not end within the grace of {grace_seconds:g} s and was killed; "
            "steps since the last checkpoint are lost, start the same command again with a longer --grace",
        )
    stopped = [outcome for outcome in own if outcome.code == EXIT_STOPPED]
    if has_lost and is_stop_requested:
        return Ending(EXIT_STOPPED, f"stopped on request; steps since the last checkpoint may be lost, {GO_ON}")
    if has_lost:
        return Ending(EXIT_FAULT, "")
    has_ended_well = len(own) == sum(group.num_ranks for group in groups) and not any(g.agent_code for g in groups)
    if has_ended_well and not stopped:
        return Ending(0, "")
    if has_ended_well or is_stop_requested or _did_one_stop_first(groups, outcomes):
        # A rank that was asked twice, or as it began, ends at once, without a word to the others or to us.
        return Ending(EXIT_STOPPED, stopped[0].message if stopped else f"stopped on request; {GO_ON}")
    return Ending(EXIT_FAULT, _silent_failure(groups, outcomes, logs))


def _did_one_stop_first(groups: Sequence[GroupEnd], outcomes: list[Outcome]) -> bool:
    """Whether what ended the ranks was that one of them was asked to stop: torchrun asks the others to, whatever became of the first."""
    codes = _reported_codes(groups)
    said = {outcome.rank for outcome in outcomes}
    has_died = any(code not in (EXIT_STOPPED, -signal.SIGTERM) for rank, code in codes.items() if rank not in said)
    if has_died or any(group.agent_code < 0 and not group.was_ended for group in groups):
        return False
    if outcomes and min(outcomes, key=lambda outcome: outcome.seconds).code != EXIT_STOPPED:
        return EXIT_STOPPED in [code for rank, code in codes.items() if rank not in said]
    return bool(outcomes) or EXIT_STOPPED in codes.values()


def _failure(outcome: Outcome, logs: Path) -> Ending:
    if outcome.code == EXIT_USER_ERROR or not outcome.message:  # it has said itself what there is to say
        return Ending(outcome.code, outcome.message)
    return Ending(outcome.code, f"rank {outcome.rank}: {outcome.message}; its log is {_log_of(outcome.rank, logs)}")


def _silent_failure(groups: Sequence[GroupEnd], outcomes: list[Outcome], logs: Path) -> str:
    """What is known of a failure that no rank owned up to."""
    first_hand = [group for group in groups if not group.was_ended] or groups
    for group in first_hand:
        if group.agent_code < 0:
            return f"torchrun was killed by {_signal_name(-group.agent_code)}, and the ranks with it"
    codes = _reported_codes(first_hand)
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:  # by which torchrun ends the others
            return f"rank {rank} was killed by {_signal_name(-code)}; its log is {_log_of(rank, logs)}"
    if outcomes:
        first = min(outcomes, key=lambda outcome: outcome.seconds)
        return f"rank {first.rank}: {first.message}; its log is {_log_of(first.rank, logs)}"
    for rank, code in codes.items():
        return f"rank {rank} ended with code {code}; its log is {_log_of(rank, logs)}"
    return f"torchrun ended with code {first_hand[0].agent_code}; its log is {first_hand[0].agent_log}"


def _reported_codes(groups: Sequence[GroupEnd]) -> dict[int, int]:
    return {rank: code for group in groups if not group.was_ended for rank, code in group.reported_codes.items()}


def _log_of(rank: int, logs: Path) -> Path:
    return output_files(logs, rank)[1]


def _signal_name(number: int) -> str:
    return signal.Signals(number).name

"""Clocks, links between nodes, and collectives of all."""

from collections.abc import Callable, Iterator, Sequence

from spade_t5.launch.doctor.checks.base import Check, Judge, Needs, Problem, Row, plain
from spade_t5.launch.doctor.report import NodeReport
from spade_t5.launch.doctor.units import milliseconds, speed
from spade_t5.training.bandwidth import CollectiveTime

MAX_CLOCK_OFFSET_SECONDS = 5.0
"""Of failing ranks the launcher shows the one that failed first by its clock, and logs of nodes are read side by side."""
SLOW_LINK_FACTOR = 2.0
"""A node is slow whose better link has less than the median's share of bandwidth by this factor."""
SAME = "="
"""Cell of a value that concerns all nodes and stands under the first one."""


def network_checks() -> Iterator[Check]:
    """The checks, in the order of the table."""
    yield Check(
        title="clock",
        asked="clocks",
        facts=("clock_offset", "clock_uncertainty"),
        show=lambda report: (
            f"{milliseconds(report.facts['clock_offset'])} +- {milliseconds(report.facts['clock_uncertainty'])}"
        ),
        judge=_clocks,
    )
    yield plain("round trip", "clocks", "round_trip", show=lambda seconds: f"{seconds * 1e6:,.0f} us")
    for backend in ("gloo", "nccl"):
        yield Check(
            title=f"link, {backend}",
            asked=f"network_{backend}",
            facts=(f"links_{backend}",),
            show=_best_link(f"links_{backend}"),
            judge=_slow_links(f"links_{backend}"),
        )


def _clocks(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    for report in reports:
        offset, uncertainty = report.facts["clock_offset"], report.facts["clock_uncertainty"]
        if abs(offset) - uncertainty > MAX_CLOCK_OFFSET_SECONDS:
            side = "ahead of" if offset > 0 else "behind"
            yield Problem(
                report.node,
                f"{abs(offset):,.3f} s {side} the main node's, give or take {milliseconds(uncertainty)}",
                "set it by NTP (timedatectl set-ntp true, or chronyc makestep)",
            )


def _best_link(fact: str) -> Callable[[NodeReport], str]:
    return lambda report: speed(max(report.facts[fact]))


def _slow_links(fact: str) -> Judge:
    def judge(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
        # Of two nodes both have the same link.
        best = sorted(max(report.facts[fact]) for report in reports)
        median = best[len(best) // 2]
        for report in reports:
            own = max(report.facts[fact])
            if len(reports) > 2 and own * SLOW_LINK_FACTOR < median:
                yield Problem(
                    report.node,
                    f"{speed(own)} to its neighbours, and the median of the nodes is {speed(median)}",
                    "see to its network card, cable and switch, or leave the node out",
                )

    return judge


def row_of_all(timed: CollectiveTime, num_nodes: int) -> Row:
    """A measurement of all ranks together."""
    if timed.num_bytes < 1024:
        value = f"{timed.seconds * 1e6:,.0f} us"
    else:
        value = f"{speed(timed.algorithm_bytes_per_second)}, bus {speed(timed.bus_bytes_per_second)}"
    title = f"{timed.name.replace('_', '-')}, {timed.backend}, {_size(timed.num_bytes)}"
    return Row(title=title, cells=[value, *[SAME] * (num_nodes - 1)], is_marked=[False] * num_nodes, verdict="")


def _size(num_bytes: int) -> str:
    return f"{num_bytes} B" if num_bytes < 1024 else f"{num_bytes / (1 << 20):.0f} MiB"

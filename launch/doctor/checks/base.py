"""What a check is, and the row of the table that it fills in."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spade_t5.launch.doctor.report import Finding, NodeReport

_REMEDIES: Mapping[str, str] = {
    "run_folder": "give a folder that all nodes share and may write",
    "text": "see to the data of that node",
    "tokenizer": "bring the tokenizer to that node",
    "settings": "bring the config file to that node",
    "network_gloo": "see to the network between the nodes, and to GLOO_SOCKET_IFNAME",
    "network_nccl": "see to the network between the nodes, and to NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more",
}
"""What to do where facts could not be gathered, by what was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a coming run asks of every node."""

    loader_workers: int = 0
    """Processes per rank that prepare batches."""
    min_open_files: int | None = None
    """Least limit of open files; None: by `least_open_files`."""
    run_dir: str = ""
    """The run folder, if there is one."""
    staging_dir: str = ""
    """Where stores are copied to, if they are."""


class Problem(NamedTuple):
    """What is wrong on a node."""

    node: str
    value: str
    remedy: str


Judge = Callable[[Sequence[NodeReport], Needs], Iterator[Problem]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One row of the table."""

    title: str
    """What is looked at."""
    asked: str
    """Gatherer of the fact."""
    show: Callable[[NodeReport], str]
    """The cell of a node that has the fact; empty if there is nothing to show."""
    judge: Judge | None = None
    """Says what is wrong, of the nodes that have the fact."""
    is_compared: bool = False
    """Values that differ are marked."""
    facts: tuple[str, ...]
    """Facts that it needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the table, filled in."""

    title: str
    """What was looked at."""
    cells: list[str]
    """A value for each node."""
    is_marked: list[bool]
    """Which of them differ from the others or are bad."""
    verdict: str
    """ok, differs or BAD; empty for what is not judged."""


def plain(title: str, asked: str, fact: str, *, show: Callable[[Any], str] = str, is_compared: bool = False) -> Check:
    """A fact that is shown and not judged."""
    return Check(
        title=title,
        asked=asked,
        facts=(fact,),
        show=lambda report: "none" if report.facts[fact] is None else show(report.facts[fact]),
        is_compared=is_compared,
    )


def same(title: str, asked: str, fact: str, remedy: str, *, width: int = 200) -> Check:
    """A fact that must be the same on all nodes."""

    def show(report: NodeReport) -> str:
        return "none" if report.facts[fact] is None else str(report.facts[fact])[:width]

    def judge(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
        for report, usual in others_than_usual(reports, lambda report: report.facts[fact]):
            yield Problem(report.node, f"{show(report)}, and {show(usual)} on {usual.node}", remedy)

    return Check(title=title, asked=asked, facts=(fact,), show=show, judge=judge, is_compared=True)


def others_than_usual(
    reports: Sequence[NodeReport], value: Callable[[NodeReport], Any]
) -> Iterator[tuple[NodeReport, NodeReport]]:
    """Reports with another value than most have (than the first, if as many have either), each with the first of the usual ones."""
    values = [repr(value(report)) for report in reports]
    if len(set(values)) > 1:
        usual = Counter(values).most_common(1)[0][0]  # of equally frequent ones that which came first
        first = reports[values.index(usual)]
        yield from ((report, first) for report, own in zip(reports, values, strict=True) if own != usual)


def row_of(
    check: Check, reports: Sequence[NodeReport], needs: Needs, told: set[tuple[str, str]]
) -> tuple[Row | None, list[Finding]]:
    """The row of a check, None if no node has anything to show, and what it found.

    Args:
        check: the check.
        reports: of all nodes.
        needs: of the run.
        told: what was reported of each node already: what could not be gathered, and reasons. It is added to.
    """
    having = [report for report in reports if all(fact in report.facts for fact in check.facts)]
    failed = {report.node: report.problems[check.asked] for report in reports if check.asked in report.problems}
    if not having and not failed:
        return None, []
    problems = list(check.judge(having, needs)) if check.judge is not None and having else []
    told |= {(problem.node, problem.value) for problem in problems}
    for node, reason in failed.items():
        if not told & {(node, check.asked), (node, reason)}:
            problems.append(Problem(node, reason, _REMEDIES.get(check.asked, "see to it on that node")))
        told |= {(node, check.asked), (node, reason)}
    cells = [
        check.show(report) if report in having else ("failed" if report.node in failed else "-") for report in reports
    ]
    shown = [cell for cell in cells if cell not in ("-", "failed")]
    usual = Counter(shown).most_common(1)[0][0] if shown else ""
    bad = {problem.node for problem in problems} | failed.keys()
    is_marked = [
        report.node in bad or (check.is_compared and cell not in (usual, "-"))
        for report, cell in zip(reports, cells, strict=True)
    ]
    is_judged = check.judge is not None or check.is_compared
    verdict = "BAD" if bad else "differs" if any(is_marked) else "ok" if is_judged else ""
    return Row(title=check.title, cells=cells, is_marked=is_marked, verdict=verdict), _findings(
        check, problems, reports
    )


def _findings(check: Check, problems: Sequence[Problem], reports: Sequence[NodeReport]) -> list[Finding]:
    """One for each problem, and one for all nodes where all have the same."""
    title = check.title.strip()
    if len(reports) > 1 and len({problem[1:] for problem in problems}) == 1 and len(problems) == len(reports):
        return [Finding(check=title, node="", value=problems[0].value, remedy=problems[0].remedy)]
    return [Finding(check=title, node=each.node, value=each.value, remedy=each.remedy) for each in problems]

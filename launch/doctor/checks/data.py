"""What the run reads on every node, and the variables that steer it."""

from collections.abc import Callable, Iterator, Sequence

from spade_t5.launch.doctor.checks.base import Check, Judge, Needs, Problem, others_than_usual, same
from spade_t5.launch.doctor.report import NodeReport
from spade_t5.launch.doctor.units import gigabytes


def data_checks(reports: Sequence[NodeReport]) -> Iterator[Check]:
    """The checks, in the order of the table: a row for each store."""
    yield same("settings", "settings", "settings", "give every node the same config file", width=12)
    for name in dict.fromkeys(name for report in reports for name in report.facts.get("text", ())):
        yield Check(
            title=f"text {name}",
            asked="text",
            facts=("text",),
            show=_hash_of(name),
            judge=_text(name),
            is_compared=True,
        )
    yield Check(
        title="tokenizer",
        asked="tokenizer",
        facts=("tokenizer",),
        show=lambda report: report.facts["tokenizer"][:12],
        judge=_tokenizer,
        is_compared=True,
    )
    yield Check(
        title="checkpoints",
        asked="checkpoints",
        facts=("checkpoint_bytes", "checkpoints_held"),
        show=lambda report: f"{report.facts['checkpoints_held']} of {gigabytes(report.facts['checkpoint_bytes'])}",
    )


def environment_checks(reports: Sequence[NodeReport]) -> Iterator[Check]:
    """The checks, in the order of the table: a row for each variable that differs."""
    known = [report.facts["variables"] for report in reports if "variables" in report.facts]
    for name in sorted({name for variables in known for name in variables}):
        if len({variables.get(name) for variables in known}) > 1:
            yield Check(
                title=name,
                asked="variables",
                facts=("variables",),
                show=_value_of(name),
                judge=_variable(name),
                is_compared=True,
            )
    alike = (
        sum(all(variables.get(name) == value for variables in known) for name, value in known[0].items())
        if known
        else 0
    )
    yield Check(
        title="environment", asked="variables", facts=("variables",), show=lambda report: f"{alike} variables alike"
    )


def _tokenizer(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
    foreign = []
    for report in reports:
        own, of_store = report.facts["tokenizer"], report.facts.get("tokenizer_of_store")
        if of_store is not None and own != of_store:
            foreign.append(report)
            yield Problem(
                report.node,
                f"{own[:12]}, and the store was made with {of_store[:12]}",
                "copy the store's own tokenizer folder to this node",
            )
    rest = [report for report in reports if report not in foreign]
    for report, usual in others_than_usual(rest, lambda report: report.facts["tokenizer"]):
        yield Problem(
            report.node,
            f"{report.facts['tokenizer'][:12]}, and {usual.facts['tokenizer'][:12]} on {usual.node}",
            "give every node the same tokenizer",
        )


def _hash_of(name: str) -> Callable[[NodeReport], str]:
    return lambda report: report.facts["text"].get(name, {}).get("hash", "missing")[:12]


def _value_of(name: str) -> Callable[[NodeReport], str]:
    return lambda report: report.facts["variables"].get(name, "not set") or "empty"


def _text(name: str) -> Judge:
    def judge(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
        there = []
        for report in reports:
            own = report.facts["text"].get(name, {"problem": f"{name}: not among the data of this node"})
            if "problem" in own:
                yield Problem(report.node, own["problem"], "bring the store to this node")
            else:
                there.append(report)
        for report, usual in others_than_usual(there, lambda report: report.facts["text"][name]):
            yield Problem(
                report.node,
                f"{report.facts['text'][name]['hash'][:12]}, and {usual.facts['text'][name]['hash'][:12]} on {usual.node}",
                "give every node the same stores or files",
            )

    return judge


def _variable(name: str) -> Judge:
    def judge(reports: Sequence[NodeReport], needs: Needs) -> Iterator[Problem]:
        value = _value_of(name)
        for report, usual in others_than_usual(reports, value):
            yield Problem(
                report.node,
                f"{value(report)}, and {value(usual)} on {usual.node}",
                "start every node with the same environment",
            )

    return judge

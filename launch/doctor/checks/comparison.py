"""All checks together."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from spade_t5.launch.doctor.checks.base import Check, Needs, Row, row_of
from spade_t5.launch.doctor.checks.data import data_checks, environment_checks
from spade_t5.launch.doctor.checks.machine import machine_checks
from spade_t5.launch.doctor.checks.network import network_checks, row_of_all
from spade_t5.launch.doctor.checks.storage import storage_checks
from spade_t5.launch.doctor.report import Finding, NodeReport
from spade_t5.training.bandwidth import CollectiveTime


class Comparison(NamedTuple):
    """What came out of it."""

    rows: list[Row]
    findings: list[Finding]


def compare(reports: Sequence[NodeReport], needs: Needs, times: Sequence[CollectiveTime] = ()) -> Comparison:
    """Compares nodes with each other and with what a run needs.

    Args:
        reports: one of each node, the main rank's first.
        needs: of the run.
        times: of collectives of all ranks.
    """
    rows: list[Row] = []
    findings: list[Finding] = []
    told: set[tuple[str, str]] = set()
    for check in _all_checks(reports):
        row, found = row_of(check, reports, needs, told)
        if row is not None:
            rows.append(row)
        findings += found
    return Comparison([*rows, *(row_of_all(timed, len(reports)) for timed in times)], findings)


def _all_checks(reports: Sequence[NodeReport]) -> Iterator[Check]:
    yield from machine_checks()
    yield from storage_checks()
    yield from data_checks(reports)
    yield from environment_checks(reports)
    yield from network_checks()

"""Check this machine, or the nodes of a coming run when started by `spade-t5 launch`: versions, GPUs, network, folders, disks, limits, clocks, data."""

import argparse
import json
import os
from typing import Any

import torch

from spade_t5.errors import UserError
from spade_t5.launch.config_files import add_recipe_arguments, foreign_settings, load_run, positive_int
from spade_t5.launch.doctor.examine import Examination, examine
from spade_t5.launch.doctor.network import as_json
from spade_t5.launch.doctor.table import table
from spade_t5.messages import one_line
from spade_t5.training import distributed
from spade_t5.training.agreement import on_main

TIMEOUT_SECONDS = 300.0
"""How long nodes wait for each other; every fact of a node has its own limit below that."""
EXIT_FOUND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_recipe_arguments(parser, kind="*", example="training.loader_workers=4", is_optional=True)
    parser.add_argument(
        "--min-open-files",
        type=positive_int,
        metavar="N",
        help="least limit of open files of a process; default what the run's processes need",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of a table")


def read_config(arguments: argparse.Namespace) -> Any:
    """The run that the arguments describe, a PretrainConfig or FinetuneConfig; None without one."""
    if arguments.config is None:
        return None
    foreign = foreign_settings(arguments)
    return load_run(arguments.config, arguments.overrides, foreign=foreign, cluster=arguments.cluster)


def run_dir_of(arguments: argparse.Namespace) -> None:
    """None: this is no run. Whatever is wrong with the config is said."""
    read_config(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command: 0 if all is well, 1 if something was found."""
    distributed.die_with_parent()
    # A collective that hangs is then an error of this process, to be reported; else NCCL's watchdog would end the process.
    if torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    distributed.join(TIMEOUT_SECONDS)
    config = _config_or_error(arguments)
    on_main(lambda: _raise_error(config))
    examination = examine(config, min_open_files=arguments.min_open_files)
    if distributed.is_main():
        print(_json(examination) if arguments.json else _text(examination))
    return EXIT_FOUND if examination.comparison.findings else 0


def _config_or_error(arguments: argparse.Namespace) -> Any:
    try:
        return read_config(arguments)
    except UserError as error:
        return error


def _raise_error(config: Any) -> None:
    if isinstance(config, UserError):
        raise config


def _text(examination: Examination) -> str:
    rows, findings = examination.comparison
    lines = [*table([report.node for report in examination.reports], rows), ""]
    lines += [one_line(str(finding)) for finding in findings] or ["nothing was found"]
    return "\n".join(lines)


def _json(examination: Examination) -> str:
    return json.dumps(
        {
            "nodes": [report.as_json() for report in examination.reports],
            "collectives": [as_json(timed) for timed in examination.times],
            "findings": [finding.as_json() for finding in examination.comparison.findings],
        },
        indent=1,
    )

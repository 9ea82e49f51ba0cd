"""On the nodes of a SLURM job.

Outside of a job, the command writes a job script and submits it; in the job, which that script is for, it starts the ranks by `srun` on all of the
job's nodes. At USR1, which SLURM sends when the time limit is near, the run saves, and the job is put back into the queue, to go on from there.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from spade_t5.errors import ConfigError
from spade_t5.launch import options
from spade_t5.launch.accelerate_config import add_shape_option, take_over_shape
from spade_t5.launch.environment import forwarded
from spade_t5.launch.many import add_arguments_of_many, launch_on
from spade_t5.launch.remote_shell import CARRIED, address_towards, is_here
from spade_t5.launch.supervisor import newest_checkpoint
from spade_t5.launch.terminal import say
from spade_t5.launch.written import check_written
from spade_t5.messages import reason_of, shown
from spade_t5.training.stopping import EXIT_STOPPED

JOB_VARIABLE = "SLURM_JOB_ID"
REMOTE_SHELL = "srun --export=ALL --nodes=1 --ntasks=1 --overlap --cpu-bind=none --unbuffered --nodelist={host}"
"""Starts a node's process as a step of its own: a node that is lost ends its step, not the job."""
SIGNAL_MARGIN_SECONDS = 60
"""Between the grace and the time limit: for the ranks to be told, and the job to be put back."""
OWN_KEYS = ("nodes", "ntasks", "ntasks-per-node", "signal", "requeue", "no-requeue", "export", "time", "gpus-per-node")
"""What `--sbatch` may not set, since this command does."""
SHARES = ("exclusive", "oversubscribe", "cpus-per-task", "mem", "mem-per-cpu", "mem-per-gpu")
"""Any of these given by `--sbatch` says how much of a node a job gets; else it gets whole nodes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes on each node")
    add_shape_option(parser)
    parser.add_argument("--time", metavar="LIMIT", help="time limit of the job, as sbatch writes it: 24:00:00")
    parser.add_argument("--gpus-per-node", metavar="N", help="GPUs of each node, as sbatch writes them: 8 or h100:8")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="another option of sbatch without its dashes, such as partition=gpu; repeatable",
    )
    parser.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the job is put back into the queue when its time limit or a lost node ends it; default yes",
    )
    add_arguments_of_many(parser)


def run(arguments: argparse.Namespace) -> int:
    """Submits a job, or runs the command in one, and returns the exit code."""
    take_over_shape(arguments)
    options.check_least(arguments, nproc_per_node=1, grace=1, lost_after=1, wait_for_nodes=1)
    if JOB_VARIABLE in os.environ:
        return _run_in_job(arguments, os.environ[JOB_VARIABLE])
    options.supervision_of(arguments)
    script = job_script(arguments, os.environ)
    if arguments.dry_run:
        print(script, end="")
        return 0
    print(_call(["sbatch", "--parsable"], stdin=script).strip().partition(";")[0])
    return 0


def job_script(arguments: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """The job script: what the job needs, and this very command, which then finds itself in the job.

    It holds the names of variables, not their values; SLURM takes those from the shell in which the job is submitted.

    Raises:
        ConfigError: an option is wrong, or a secret would stand in the script.
    """
    if arguments.nnodes is None:
        raise ConfigError("--nnodes: how many nodes the job gets; give MIN:MAX or one number")
    check_written(
        arguments.words, arguments.env, "SLURM keeps job scripts", "set a variable, and name it by --env NAME"
    )
    least, most = arguments.nnodes
    names = sorted(forwarded([word for word in arguments.env if "=" not in word], environment))
    lines = [
        f"--nodes={least}" if least == most else f"--nodes={least}-{most}",
        "--ntasks-per-node=1",
        f"--signal=B:USR1@{int(arguments.grace) + SIGNAL_MARGIN_SECONDS}",
        "--requeue" if arguments.requeue else "--no-requeue",
        "--no-kill",
        f"--export={','.join(names) or 'NONE'}",
    ]
    if arguments.time is not None:
        lines.append(f"--time={_value('--time', arguments.time)}")
    if arguments.gpus_per_node is not None:
        lines.append(f"--gpus-per-node={_value('--gpus-per-node', arguments.gpus_per_node)}")
    given = dict(_sbatch_option(word) for word in arguments.sbatch)
    if not any(key in given for key in SHARES):
        lines += ["--exclusive", "--mem=0"]
    for key, value in {"open-mode": "append", **given}.items():
        lines.append(f"--{key}" if value is None else f"--{key}={_value(f'--sbatch {key}', value)}")
    carried = [f"export {name}={shlex.quote(environment[name])}" for name in CARRIED if environment.get(name)]
    command = shlex.join([sys.executable, "-m", "spade_t5.launch", *_words_in_job(arguments)])
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {line}" for line in lines),
            *carried,
            f"cd {shlex.quote(os.getcwd())} || exit 2",
            f"exec {command}",  # so that SLURM's signals reach it
            "",
        ]
    )


def _words_in_job(arguments: argparse.Namespace) -> list[str]:
    """The words of this command as the job has them."""
    least, most = arguments.nnodes
    return [
        *("launch", "slurm", "--nnodes", f"{least}:{most}", "--nproc-per-node", str(arguments.nproc_per_node)),
        *("--max-restarts", str(arguments.max_restarts), "--grace", f"{arguments.grace:g}"),
        *("--lost-after", f"{arguments.lost_after:g}", "--wait-for-nodes", f"{arguments.wait_for_nodes:g}"),
        *(() if arguments.requeue else ("--no-requeue",)),
        *(() if arguments.address is None else ("--address", arguments.address)),
        *(() if arguments.log_dir is None else ("--log-dir", str(arguments.log_dir))),
        *(word for given in arguments.env for word in ("--env", given)),
        *("--", *arguments.words),
    ]


def _sbatch_option(word: str) -> tuple[str, str | None]:
    key, has_value, value = word.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]*", key):
        raise ConfigError(
            f"--sbatch: {shown(word)} is not KEY or KEY=VALUE with a long option of sbatch, such as partition=gpu"
        )
    if key in OWN_KEYS:
        raise ConfigError(f"--sbatch: {key} is set by this command; use its own options")
    return key, value if has_value else None


def _value(option: str, value: str) -> str:
    """A value as a line of a job script can have it."""
    if not value or not value.isprintable() or "'" in value:
        raise ConfigError(
            f"{option}: {shown(value)} cannot stand in a job script; give a printable value without quotes"
        )
    return shlex.quote(value)


def _run_in_job(arguments: argparse.Namespace, job: str) -> int:
    for name in ("time", "gpus_per_node", "sbatch"):
        if getattr(arguments, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: belongs to a job that is submitted, and this is in job {job}; leave it out, or submit from outside"
            )
    hosts = _call(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
    least, most = arguments.nnodes or (len(hosts), len(hosts))
    arguments.nnodes = least, min(most, len(hosts))  # the job may have got fewer than the most
    if least > len(hosts):
        raise ConfigError(f"--nnodes: {least} nodes are wanted, but job {job} has {len(hosts)}; ask sbatch for as many")
    if arguments.address is None:
        arguments.address = _own_address(hosts)
    run_dir = options.supervision_of(arguments).run_dir
    before = newest_checkpoint(run_dir)

    def put_back(code: int, request: signal.Signals | None) -> None:
        # At SIGTERM somebody has cancelled the job, or SLURM preempts it and puts it back itself.
        if not (arguments.requeue and code == EXIT_STOPPED and request == signal.SIGUSR1):
            return
        if run_dir is None or newest_checkpoint(run_dir) == before:
            say(f"job {job} is not put back, for it has made no checkpoint; give it more --time")
            return
        try:
            _call(["scontrol", "requeue", job])
        except ConfigError as error:
            say(f"job {job} could not be put back: {error}")
        else:
            say(f"job {job} is put back into the queue, to go on from there")

    return launch_on([(host, arguments.nproc_per_node) for host in hosts], arguments, REMOTE_SHELL, on_end=put_back)


def _own_address(hosts: Sequence[str]) -> str | None:
    """This node's address on the way to another one, by the addresses that SLURM has; None if all hosts are this one."""
    for host in hosts:
        if not is_here(host):
            found = re.search(r"\bNodeAddr=(\S+)", _call(["scontrol", "show", "node", "--oneliner", host]))
            with_name = found[1] if found else host
            try:
                return address_towards(with_name)
            except OSError as error:
                raise ConfigError(
                    f"--address: no way to {with_name} ({error.strerror}); give the address of this node that the others reach"
                ) from None
    return None


def _call(command: Sequence[str], *, stdin: str = "") -> str:
    """What a command of SLURM prints.

    Raises:
        ConfigError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"{command[0]}: cannot be run ({error.strerror}); run this where SLURM's commands are"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"{shlex.join(command)}: {reason_of(RuntimeError(done.stderr))}")
    return done.stdout

"""One machine of a launch on many: runs its ranks when the coordinator says so, and tells how they ended.

It is started by the other forms of `spade-t5 launch`, with a line of JSON on its standard input that holds the launch's secret. When that input ends, or
the coordinator is silent for too long, it kills its ranks: they may be training on what another start of the same run writes.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from spade_t5.errors import ConfigError
from spade_t5.launch import options
from spade_t5.launch.cli import EXIT_FAULT, EXIT_USER_ERROR
from spade_t5.launch.ending import GroupEnd
from spade_t5.launch.environment import machine_variables
from spade_t5.launch.group import POLL_SECONDS, Group, Place, Ranks, Start, remove_left_folders
from spade_t5.launch.link import Link, LinkLostError, Message
from spade_t5.launch.local import threads_per_rank
from spade_t5.launch.rank import NODE_VARIABLE
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.terminal import say
from spade_t5.messages import reason_of, shown
from spade_t5.training.outcome import Outcome
from spade_t5.training.shared_folder import PATIENCE_SECONDS
from spade_t5.training.stopping import EXIT_STOPPED

CONNECT_SECONDS = 5.0
"""How long an attempt to reach the coordinator may take."""
CONNECT_PAUSE_SECONDS = 1.0
"""Between two attempts."""
SECRET_VARIABLE = "SPADE_T5_LAUNCH_TOKEN"
"""The launch's secret, where no coordinator starts this process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument(
        "--coordinator", required=True, metavar="HOST:PORT", help="where the process listens that starts all machines"
    )
    parser.add_argument("--name", required=True, help="name of this machine in the launch")
    parser.add_argument("--nproc-per-node", type=int, required=True, metavar="N", help="processes on this machine")
    options.add_patience(parser)
    options.add_grace(parser)
    parser.add_argument(
        "--secret-from",
        choices=["stdin", "environment"],
        default="stdin",
        help=f"where the launch's secret is: a line of JSON on the standard input, at whose end this process ends, or {SECRET_VARIABLE}",
    )
    options.add_command(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the ranks of this machine, as often as the coordinator says, and returns the exit code of the launch."""
    options.check_least(arguments, nproc_per_node=1, grace=1, lost_after=options.LEAST_LOST_AFTER, wait_for_nodes=1)
    has_input = arguments.secret_from == "stdin"
    introduction = _introduction_of_input() if has_input else _introduction_of_environment()
    if not introduction["secret"]:
        raise ConfigError(f"{SECRET_VARIABLE}: not set; give it the secret that the coordinator of this launch has")
    remove_left_folders()
    with _NodeStop() as stop, _Node(arguments, introduction, stop) as node:
        return node.serve(has_input=has_input)


class _NodeStop(LauncherStop):
    """What this machine's process was asked to do.

    A scheduler may take its time to signal all machines, so a signal that comes behind the coordinator's message is no second request: such
    requests come from the coordinator only.
    """

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_requested:
            self.request(number)


class _Node:
    """The state of this machine."""

    def __init__(self, arguments: argparse.Namespace, introduction: dict[str, Any], stop: LauncherStop) -> None:
        self._arguments, self._introduction, self._stop = arguments, introduction, stop
        self._link: Link | None = None
        self._group: Group | None = None
        self._own_logs: Path | None = None
        """Folder of the ranks' output if this machine has made it for itself."""
        self._lost_at = time.monotonic()
        self._tried_at = -CONNECT_PAUSE_SECONDS
        self._requests_told = 0
        self._why_alone = "it was not tried yet"

    def __enter__(self) -> "_Node":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_group()
        if self._link is not None:
            self._link.close()

    def serve(self, *, has_input: bool) -> int:
        """Does what the coordinator says until it says how to end, or is gone."""
        while True:
            if has_input and _has_ended(sys.stdin.fileno()):
                say(f"{self._arguments.name}: the coordinator is gone, ending")
                return EXIT_FAULT
            try:
                code = self._turn()
            except LinkLostError as error:
                self._why_alone = reason_of(error)
                self._lose()
                code = None
            if code is not None:
                return code
            time.sleep(POLL_SECONDS)

    def _turn(self) -> int | None:
        """One look at everything; returns the exit code once the coordinator has said it."""
        if self._link is None:
            return self._connect()
        for message in self._link.receive():
            if message["do"] == "finish":
                if "why" in message:
                    say(f"{self._arguments.name}: {shown(message['why'])}")
                return int(message["code"])
            self._on_message(message)
        if self._link.silence_seconds > self._arguments.lost_after:
            raise LinkLostError
        if self._stop.times > self._requests_told and self._stop.signal is not None:
            self._requests_told = self._stop.times
            self._link.send({"do": "stop", "signal": int(self._stop.signal)})
        if self._group is not None and (end := self._group.poll()) is not None:
            self._end_group()
            self._report(end)
        self._link.beat()
        return None

    def _connect(self) -> int | None:
        """Tries to reach the coordinator, or gives up."""
        now = time.monotonic()
        if self._stop.is_requested:
            return EXIT_STOPPED
        if now - self._lost_at > self._arguments.wait_for_nodes:
            say(
                f"{self._arguments.name}: no coordinator at {self._arguments.coordinator} within --wait-for-nodes {self._arguments.wait_for_nodes:g} s ({self._why_alone})"
            )
            return EXIT_FAULT
        if now - self._tried_at < CONNECT_PAUSE_SECONDS:
            return None
        self._tried_at = now
        host, _, port = self._arguments.coordinator.rpartition(":")
        try:
            connected = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS)
        except OSError as error:
            self._why_alone = reason_of(error)
            return None
        link = Link(connected, self._introduction["secret"].encode(), is_coordinator=False)
        link.send(
            {
                "do": "hello",
                "name": self._arguments.name,
                "generation": self._introduction["generation"],
                "port": _free_port(link.local_address),
            }
        )
        self._link = link
        return None

    def _lose(self) -> None:
        """The coordinator is gone: so are, for it, the ranks of this machine."""
        if self._link is not None:
            self._link.close()
            self._link = None
            self._lost_at = time.monotonic()
            if self._group is not None:
                say(f"{self._arguments.name}: lost the coordinator, ending the ranks of this node")
        self._end_group()

    def _on_message(self, message: Message) -> None:
        if message["do"] == "start":
            self._end_group()
            self._start(message)
        elif message["do"] == "stop":
            self._requests_told = max(self._requests_told, int(message["times"]))
            if self._stop.times < self._requests_told:
                self._stop.request(signal.Signals(message["signal"]))
        elif message["do"] == "end" and self._group is not None:
            self._group.end_soon()

    def _start(self, message: Message) -> None:
        assert self._link is not None
        forwarded = self._introduction["environment"]
        num_ranks = self._arguments.nproc_per_node
        ranks = Ranks(
            command=self._arguments.words,
            num_ranks=num_ranks,
            environment={
                "OMP_NUM_THREADS": threads_per_rank(num_ranks),
                **machine_variables(self._link.local_address, {**os.environ, **forwarded}),
                **forwarded,
                NODE_VARIABLE: self._arguments.name,
            },
            grace_seconds=self._arguments.grace,
        )
        logs, place = Path(message["logs"]), Place(*message["place"])
        try:
            self._prepare(logs)
            began = time.monotonic() - float(message["seconds"])
            self._group = Group(ranks, Start(logs, int(message["attempt"]), began, place), self._stop).__enter__()
        except OSError as error:
            self._report(self._not_started(error, logs, int(message["attempt"]), place.first_rank))

    def _not_started(self, error: OSError, logs: Path, attempt: int, first_rank: int) -> GroupEnd:
        """The end of ranks that were never started."""
        name, reason = self._arguments.name, reason_of(error)
        if attempt == 0 and not os.access(logs, os.W_OK):  # which starting again does not mend
            code = EXIT_USER_ERROR
            text = f"{name}: {logs} cannot be written ({reason}); give a run_dir, or a --log-dir, that all nodes share and may write"
        else:
            code = EXIT_FAULT
            text = (
                f"{name}: the ranks cannot be started ({reason}); make room in {tempfile.gettempdir()} and {logs} there"
            )
        outcome = Outcome(rank=first_rank, code=code, message=text, seconds=time.time())
        num_ranks = self._arguments.nproc_per_node
        return GroupEnd(num_ranks=num_ranks, outcomes=[outcome], agent_code=code, reported_codes={}, agent_log="")

    def _prepare(self, logs: Path) -> None:
        """Sees to it that the folder of the ranks' output is there, if it can be."""
        if self._arguments.words[0] in options.RUNS:
            self._wait_for(logs)
        elif not logs.exists():  # whether machines share a folder is what such a command is to find out
            logs.mkdir(parents=True)
            self._own_logs = logs

    def _wait_for(self, folder: Path) -> None:
        """Waits until this machine sees a folder that another has just made."""
        assert self._link is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not folder.is_dir() and time.monotonic() < deadline:
            self._link.beat()
            time.sleep(POLL_SECONDS)

    def _report(self, end: GroupEnd) -> None:
        assert self._link is not None
        if self._own_logs is not None and not any(outcome.message for outcome in end.outcomes):
            shutil.rmtree(self._own_logs, ignore_errors=True)
        self._link.send({"do": "ended", "end": end.as_json(), "port": _free_port(self._link.local_address)})

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.__exit__(None, None, None)
            self._group = None


def _introduction_of_input() -> dict[str, Any]:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        introduction = json.loads(sys.stdin.readline())
        environment = {str(name): str(value) for name, value in introduction["environment"].items()}
        generation = int(introduction["generation"])
        return {"secret": str(introduction["secret"]), "environment": environment, "generation": generation}
    raise ConfigError(
        "standard input: no line with the secret of a launch came; this command is started by spade-t5 launch"
    )


def _introduction_of_environment() -> dict[str, Any]:
    return {"secret": os.environ.get(SECRET_VARIABLE), "environment": {}, "generation": 0}


def _has_ended(descriptor: int) -> bool:
    """Whether a pipe's other end was closed; what comes through it is thrown away."""
    while select.select([descriptor], [], [], 0)[0]:
        if not os.read(descriptor, 2**12):
            return True
    return False


def _free_port(address: str) -> int:
    """A port on which nobody listens at the moment."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        return int(listener.getsockname()[1])

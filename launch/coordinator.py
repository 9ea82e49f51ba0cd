"""Starts the ranks of many machines together, and ends them together: the one process of a launch that knows of all machines.

Each machine runs `spade-t5 launch node` (`node.py`), which connects to the coordinator and starts a torchrun of its own when it is told to. The
coordinator gives ranks to the machines that are there, passes requests to stop on, and tells the others when one has failed or is lost. A machine
is lost when its connection breaks or is silent for too long. The next start waits for it, and goes on with fewer machines if that is allowed; later
ones take it in again if it is there, and do not wait for it.
"""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from spade_t5.errors import ConfigError
from spade_t5.launch.cli import EXIT_FAULT
from spade_t5.launch.ending import GO_ON, Ending, GroupEnd, ending_of
from spade_t5.launch.group import POLL_SECONDS, Place, popen_tied
from spade_t5.launch.link import Link, LinkLostError, Message
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.launch.terminal import say, write
from spade_t5.training.stopping import EXIT_STOPPED

START_PAUSE_SECONDS = 5.0
"""Between two attempts to start the process of a machine."""
MAX_START_PAUSE_SECONDS = 60.0
"""Likewise, once the ranks were started without the machine."""
MAX_FAILED_STARTS = 3
"""Attempts in a row that may fail before the first start of the ranks; later a machine may take its time, to boot for one."""
FINISH_SECONDS = 10.0
"""How long the machines' processes have to end in the end."""
MAX_STRANGERS = 256
"""Connections that are waited for at once to prove themselves."""
SHOW_SECONDS = 1.0
"""How long the last words of a machine's process are waited for; what it started may hold its output open."""
STOP_MARGIN_SECONDS = 30.0
"""How much longer than the ranks may take to stop a machine may take to say so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One machine of a launch."""

    name: str
    """By which it is known to the user, and introduces itself."""
    num_ranks: int
    """Ranks on it."""
    start: Sequence[str] | None
    """Command that starts its process; None if somebody else does. `{coordinator}` in a word becomes this process's address."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """Which machines a launch may have, and how it deals with those that go."""

    machines: Sequence[Machine]
    """All, in the order of their ranks."""
    min_machines: int
    """With how many of them the run goes on."""
    address: str
    """This machine's, where the others connect to."""
    port: int = 0
    """Likewise; 0: one that is free."""
    secret: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Without which no machine is let in."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Variables of the ranks of machines that are started from here."""
    grace_seconds: float
    """How long ranks have to save and end once they are asked to stop."""
    lost_after_seconds: float
    """A machine that is silent for so long is lost."""
    wait_seconds: float
    """How long a start waits for machines that are not there."""


class _Remote:
    """What the coordinator knows of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = -START_PAUSE_SECONDS
        self.lost_at: float | None = None
        self.was_left_out = False
        self.failed_starts = 0
        self.generation = 0
        self.link: Link | None = None
        self.port = 0
        self.is_taking_part = False
        self.end: GroupEnd | None = None
        self.is_lost = False
        self.num_requests = 0
        self.was_told_to_end = False

    @property
    def name(self) -> str:
        return self.machine.name

    def begin(self) -> None:
        """Forgets the start before."""
        self.is_taking_part, self.is_lost, self.end = False, False, None
        self.num_requests, self.was_told_to_end = 0, False


class Coordinator:
    """The machines of a launch; their processes run while it is entered as a context."""

    def __init__(self, gathering: Gathering, stop: LauncherStop) -> None:
        """Prepares a launch; `stop` is what this process is asked to do, and takes requests that come from machines."""
        self._gathering, self._stop = gathering, stop
        self._remotes = {machine.name: _Remote(machine) for machine in gathering.machines}
        self._new_links: queue.SimpleQueue[tuple[Link, Message]] = queue.SimpleQueue()
        self._began = time.monotonic()
        self._is_closing = False
        self._showing: list[threading.Thread] = []
        self._is_first = True
        self._code = EXIT_FAULT

    def __enter__(self) -> Self:
        """Listens for the machines."""
        family = socket.AF_INET6 if ":" in self._gathering.address else socket.AF_INET
        address = self._gathering.address
        try:
            self._listener = socket.create_server((address, self._gathering.port), family=family)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(
                f"--address: this machine cannot listen at {address} ({reason}); give an address of this machine that all others reach"
            ) from None
        host, port = self._listener.getsockname()[:2]
        self.place = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Has all machines' processes end with the code of `finish`, and ends those that do not."""
        for remote in self._remotes.values():
            self._send(remote, {"do": "finish", "code": self._code})
        self._is_closing = True
        self._listener.close()
        processes = [remote.process for remote in self._remotes.values() if remote.process is not None]
        deadline = time.monotonic() + FINISH_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            process.kill()
            process.wait()
        for thread in self._showing:
            thread.join(SHOW_SECONDS)

    def finish(self, code: int) -> int:
        """Says with which code this launch ends, and returns it."""
        self._code = code
        return code

    def run(self, attempt: int, logs: Path) -> Ending:
        """Starts the ranks on all machines that are there, and waits for their end.

        Args:
            attempt: starts before this one.
            logs: folder of the ranks' output, the same on all machines.
        """
        for remote in self._remotes.values():
            remote.begin()
        ending = self._gather()
        if ending is not None:
            return ending
        self._is_first = False
        taking_part = [remote for remote in self._remotes.values() if remote.link is not None]
        self._start(taking_part, attempt, logs)
        while any(remote.end is None and not remote.is_lost for remote in taking_part):
            self._pump()
            self._pass_on_requests(taking_part)
            self._end_all_after_one(taking_part)
            time.sleep(POLL_SECONDS)
        return ending_of(
            [remote.end for remote in taking_part if remote.end is not None],
            logs=logs,
            is_stop_requested=self._stop.is_requested,
            grace_seconds=self._gathering.grace_seconds,
            has_lost=any(remote.is_lost for remote in taking_part),
        )

    def _gather(self) -> Ending | None:
        """Waits for the machines; returns how it ends if not enough come."""
        deadline = time.monotonic() + self._gathering.wait_seconds
        while True:
            self._pump()
            if self._stop.is_requested:
                return Ending(EXIT_STOPPED, f"stopped before training; {GO_ON}")
            missing = [remote for remote in self._remotes.values() if remote.link is None]
            num_there = len(self._remotes) - len(missing)
            if all(remote.was_left_out for remote in missing) and num_there >= self._gathering.min_machines:
                return None
            has_given_up = all(self._is_first and r.failed_starts >= MAX_FAILED_STARTS for r in missing)
            if time.monotonic() > deadline or has_given_up:
                break
            time.sleep(POLL_SECONDS)
        names = ", ".join(remote.name for remote in missing)
        if num_there < self._gathering.min_machines:
            why = (
                f"the command that starts a node there failed {MAX_FAILED_STARTS} times; run it by hand, --dry-run shows it"
                if has_given_up
                else f"no sign of it within --wait-for-nodes {self._gathering.wait_seconds:g} s"
            )
            return Ending(
                EXIT_FAULT,
                f"{names}: {why}; {num_there} of {len(self._remotes)} nodes are there, --nnodes demands {self._gathering.min_machines}",
                is_final=True,
            )
        for remote in missing:
            remote.was_left_out = True
        say(f"going on with {num_there} of {len(self._remotes)} nodes, without {names}")
        return None

    def _start(self, taking_part: list[_Remote], attempt: int, logs: Path) -> None:
        first = taking_part[0]
        assert first.link is not None
        first_rank, world_size = 0, sum(remote.machine.num_ranks for remote in taking_part)
        for number, remote in enumerate(taking_part):
            place = Place(number, len(taking_part), first_rank, world_size, first.link.peer_address, first.port)
            first_rank += remote.machine.num_ranks
            remote.is_taking_part = True
            self._send(
                remote,
                {
                    "do": "start",
                    "attempt": attempt,
                    "logs": str(logs.absolute()),
                    "seconds": time.monotonic() - self._began,
                    "place": list(place),
                },
            )

    def _pump(self) -> None:
        """Everything that has to go on all the time."""
        while not self._new_links.empty():
            self._take_in(*self._new_links.get())
        for remote in self._remotes.values():
            self._hear(remote)
            if remote.link is None:
                self._start_process(remote)

    def _take_in(self, link: Link, hello: Message) -> None:
        remote = self._remotes.get(str(hello.get("name")))
        if remote is None:
            _refuse(link, "no node of this name belongs to this launch")
            return
        if hello.get("generation") != remote.generation:  # its standard input has lost us, and it is about to find out
            _refuse(link, "another process takes its place")
            return
        if remote.link is not None:  # a process of before, whose connection seemed to live
            _refuse(remote.link, "another process takes its place")
            self._lose(remote, "it began again")
        remote.link, remote.port, remote.failed_starts = link, int(hello["port"]), 0
        remote.lost_at, remote.was_left_out = None, False

    def _hear(self, remote: _Remote) -> None:
        if remote.link is None:
            return
        try:
            for message in remote.link.receive():
                self._on_message(remote, message)
            remote.link.beat()
        except LinkLostError:
            self._lose(remote, "its connection broke")
            return
        if remote.link.silence_seconds > self._gathering.lost_after_seconds:
            self._lose(remote, f"no sign of it for {self._gathering.lost_after_seconds:g} s")

    def _on_message(self, remote: _Remote, message: Message) -> None:
        if message["do"] == "stop" and not self._stop.is_requested:
            self._stop.request(signal.Signals(message["signal"]))
        elif message["do"] == "ended":
            remote.port = int(message["port"])
            if remote.is_taking_part:
                remote.end = GroupEnd.from_json(message["end"])

    def _lose(self, remote: _Remote, how: str) -> None:
        assert remote.link is not None
        remote.link.close()
        remote.link, remote.lost_at = None, time.monotonic()
        if remote.is_taking_part and remote.end is None and not remote.is_lost:
            remote.is_lost = True
            say(f"lost {remote.name}: {how}")

    def _send(self, remote: _Remote, message: Message) -> None:
        if remote.link is not None:
            try:
                remote.link.send(message)
            except LinkLostError:
                self._lose(remote, "its connection broke")

    def _start_process(self, remote: _Remote) -> None:
        """Starts the process of a machine that is not there, if that is our business and it is time for it."""
        if remote.machine.start is None:
            return
        now = time.monotonic()
        if remote.process is not None:
            if remote.lost_at is not None and now - remote.lost_at > self._gathering.lost_after_seconds:
                remote.lost_at = None  # a remote shell may not notice that what it started, or its machine, is gone
                remote.process.kill()
                remote.process.wait()
            code = remote.process.poll()
            if code is None:
                return
            remote.process = None
            remote.failed_starts += 1
            if code and remote.failed_starts & (remote.failed_starts - 1) == 0:  # the first, second, fourth, ... time
                say(f"{remote.name}: the command that starts a node there ended with code {code}")
        pause = MAX_START_PAUSE_SECONDS if remote.was_left_out else START_PAUSE_SECONDS
        if now - remote.started_at < pause:
            return
        if self._is_first and remote.failed_starts >= MAX_FAILED_STARTS:
            return
        remote.started_at = now
        words = [word.replace("{coordinator}", self.place) for word in remote.machine.start]
        try:
            process = popen_tied(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            say(f"{remote.name}: {words[0]} cannot be started ({error.strerror})")
            remote.failed_starts += 1
            return
        remote.process = process
        remote.generation += 1
        # By its standard input, which no other user can see, and which ends with this process.
        known = {"secret": self._gathering.secret, "environment": self._gathering.environment}
        introduction = json.dumps({**known, "generation": remote.generation}) + "\n"
        with contextlib.suppress(OSError):
            process.stdin.write(introduction.encode())  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        for stream, pipe in ((1, process.stdout), (2, process.stderr)):
            assert pipe is not None
            self._showing.append(threading.Thread(target=_show, args=(pipe, stream), daemon=True))
            self._showing[-1].start()

    def _pass_on_requests(self, taking_part: list[_Remote]) -> None:
        stop = self._stop
        if stop.signal is None:
            return
        for remote in taking_part:
            while remote.num_requests < stop.times:
                remote.num_requests += 1
                self._send(remote, {"do": "stop", "signal": int(stop.signal), "times": remote.num_requests})
            is_late = time.monotonic() > stop.at + self._gathering.grace_seconds + STOP_MARGIN_SECONDS
            if is_late and remote.end is None and remote.link is not None:
                self._lose(remote, "it did not stop in time")

    def _end_all_after_one(self, taking_part: list[_Remote]) -> None:
        """Tells the others once the ranks of a machine have failed, or it is lost."""
        if not any(remote.is_lost or (remote.end is not None and _has_failed(remote.end)) for remote in taking_part):
            return
        for remote in taking_part:
            if remote.end is None and not remote.was_told_to_end:
                remote.was_told_to_end = True
                self._send(remote, {"do": "end"})

    def _accept(self) -> None:
        strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        while not self._is_closing:
            strangers.acquire()
            try:
                connected, _ = self._listener.accept()
            except OSError:  # of a connection that is gone again, or for want of descriptors
                strangers.release()
                time.sleep(POLL_SECONDS)
                continue
            threading.Thread(target=self._introduce, args=(connected, strangers), daemon=True).start()

    def _introduce(self, connected: socket.socket, strangers: threading.BoundedSemaphore) -> None:
        """Takes a new connection's proof and name, in a thread of its own: a stranger may not say anything at all."""
        with contextlib.ExitStack() as stack:
            stack.callback(strangers.release)
            stack.enter_context(contextlib.suppress(LinkLostError, OSError))
            link = Link(connected, self._gathering.secret.encode(), is_coordinator=True)
            deadline = time.monotonic() + self._gathering.lost_after_seconds
            while not (messages := link.receive()):
                if time.monotonic() > deadline:
                    link.close()
                    return
                time.sleep(POLL_SECONDS)
            self._new_links.put((link, messages[0]))


def _refuse(link: Link, why: str) -> None:
    """Ends a machine's process that has no business here."""
    with contextlib.suppress(LinkLostError):
        link.send({"do": "finish", "code": EXIT_FAULT, "why": why})
    link.close()


def _has_failed(end: GroupEnd) -> bool:
    """Whether the ranks of a machine ended otherwise than all do together."""
    return end.agent_code != 0 or any(outcome.code not in (0, EXIT_STOPPED) for outcome in end.outcomes)


def _show(pipe: IO[bytes], stream: int) -> None:
    """Shows what a machine's process writes, as it comes, and reads on when nobody takes it any more."""
    read: Callable[[int], bytes] = pipe.read1  # type: ignore[attr-defined]
    while block := read(2**16):
        write(stream, block)

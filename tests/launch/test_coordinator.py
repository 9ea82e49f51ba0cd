"""The coordinator of a launch on several machines, whose node processes are played by threads."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spade_t5.launch import coordinator as coordinator_module
from spade_t5.launch import link as link_module
from spade_t5.launch.coordinator import Coordinator, Gathering, Machine
from spade_t5.launch.ending import Ending, GroupEnd
from spade_t5.launch.link import Link, LinkLostError, LinkRefusedError
from spade_t5.launch.stop_requests import LauncherStop
from spade_t5.testing import documented
from spade_t5.training.outcome import Outcome

SECRET = "the secret of this launch"
PATIENCE_SECONDS = 30


class Node:
    """A machine's process as the coordinator sees it: it ends every start of its ranks well."""

    def __init__(self, place: str, name: str, *, generation: int = 0, secret: str = SECRET) -> None:
        host, port = place.rsplit(":", 1)
        self.link = Link(socket.create_connection((host, int(port))), secret.encode(), is_coordinator=False)
        self.starts: list[dict[str, Any]] = []
        self.code: int | None = None
        self.link.send({"do": "hello", "name": name, "generation": generation, "port": 1})
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(LinkLostError):
            while self.code is None:
                for message in self.link.receive():
                    if message["do"] == "start":
                        self.starts.append(message)
                        end = GroupEnd(
                            num_ranks=1,
                            outcomes=[Outcome(rank=message["place"][2], code=0, message="", seconds=time.time())],
                            agent_code=0,
                            reported_codes={},
                            agent_log="",
                        )
                        self.link.send({"do": "ended", "end": end.as_json(), "port": 1})
                    elif message["do"] == "finish":
                        self.code = message["code"]
                self.link.beat()
                time.sleep(0.01)


@contextlib.contextmanager
def coordinated(*machines: Machine, **fields: Any) -> Iterator[Coordinator]:
    gathering = Gathering(
        **{
            "machines": machines,
            "min_machines": len(machines),
            "address": "127.0.0.1",
            "secret": SECRET,
            "grace_seconds": 5,
            "lost_after_seconds": 10,
            "wait_seconds": PATIENCE_SECONDS,
            **fields,
        }
    )
    with Coordinator(gathering, LauncherStop()) as made:
        yield made


def join(place: str, name: str, **fields: Any) -> Node:
    """A machine's process that tries again where strangers are before it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return Node(place, name, **fields)
        except LinkRefusedError:
            raise
        except LinkLostError:
            assert time.monotonic() < deadline


def machine(name: str, start: list[str] | None = None) -> Machine:
    return Machine(name=name, num_ranks=1, start=start)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_are_given_out_in_order_and_no_message_holds_a_variable(tmp_path: Path) -> None:
    with coordinated(machine("a"), machine("b"), environment={"API_KEY": "unspeakable"}) as coordinator:
        b, a = (Node(coordinator.place, name) for name in ("b", "a"))
        assert coordinator.run(0, tmp_path) == Ending(0, "")
        assert coordinator.finish(75) == 75
    assert [start["place"] for start in (*a.starts, *b.starts)] == [
        [0, 2, 0, 2, "127.0.0.1", 1],
        [1, 2, 1, 2, "127.0.0.1", 1],
    ]
    assert "unspeakable" not in json.dumps([a.starts, b.starts])
    wait_until(lambda: a.code == b.code == 75)


def test_strangers_do_not_keep_machines_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "MAX_STRANGERS", 4)
    monkeypatch.setattr(link_module, "INTRODUCTION_SECONDS", 1.0)
    with contextlib.ExitStack() as stack, coordinated(machine("a")) as coordinator:
        host, port = coordinator.place.split(":")
        for _ in range(20):
            stack.enter_context(socket.create_connection((host, int(port))))
        with pytest.raises(LinkRefusedError, match="another secret"):
            join(coordinator.place, "a", secret="a guess")
        unknown = join(coordinator.place, "z")
        join(coordinator.place, "a")
        assert coordinator.run(0, tmp_path) == Ending(0, "")
        wait_until(lambda: unknown.code == 1)


def test_a_connection_that_cannot_be_taken_is_not_the_last(tmp_path: Path) -> None:
    class Failing:
        """A listener without descriptors for a while."""

        def __init__(self, listener: socket.socket) -> None:
            self._listener, self.num_failures = listener, 0

        def accept(self) -> tuple[socket.socket, Any]:
            if self.num_failures < 3:
                self.num_failures += 1
                raise OSError(24, "Too many open files")
            return self._listener.accept()

        def close(self) -> None:
            self._listener.close()

    with coordinated(machine("a")) as coordinator:
        failing = Failing(coordinator._listener)
        coordinator._listener = failing  # type: ignore[assignment]
        Node(coordinator.place, "a")  # the thread waits in the real one
        assert coordinator.run(0, tmp_path) == Ending(0, "")
        wait_until(lambda: failing.num_failures == 3)
        assert coordinator._remotes["a"].link is not None
        again = Node(coordinator.place, "a")
        wait_until(lambda: not coordinator._new_links.empty())
        assert coordinator.run(1, tmp_path) == Ending(0, "")
        assert again.starts


def test_a_remote_shell_that_does_not_notice_its_end_is_replaced(tmp_path: Path) -> None:
    with coordinated(machine("a", ["sleep", "1000"]), lost_after_seconds=1.0) as coordinator:
        runs: list[Ending] = []
        thread = threading.Thread(target=lambda: runs.append(coordinator.run(0, tmp_path)), daemon=True)
        thread.start()
        wait_until(lambda: coordinator._remotes["a"].generation == 1)
        first = coordinator._remotes["a"].process
        assert first is not None
        Node(coordinator.place, "a", generation=1)
        thread.join(PATIENCE_SECONDS)
        assert runs == [Ending(0, "")]
        link = coordinator._remotes["a"].link
        assert link is not None
        link.close()
        thread = threading.Thread(target=lambda: runs.append(coordinator.run(1, tmp_path)), daemon=True)
        thread.start()
        wait_until(lambda: coordinator._remotes["a"].generation == 2)
        assert first.poll() is not None
        refused = Node(coordinator.place, "a", generation=1)
        wait_until(lambda: refused.code == 1)
        Node(coordinator.place, "a", generation=2)
        thread.join(PATIENCE_SECONDS)
        assert runs == [Ending(0, ""), Ending(0, "")]


def test_a_machine_that_was_left_out_is_not_waited_for_again_but_taken_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with coordinated(machine("a"), machine("b"), min_machines=1, wait_seconds=1) as coordinator:
        Node(coordinator.place, "a")
        assert coordinator.run(0, tmp_path) == Ending(0, "")
        said = capfd.readouterr().err
        assert said == "spade-t5 launch: going on with 1 of 2 nodes, without b\n"
        documented(said)
        coordinator._gathering = dataclasses.replace(coordinator._gathering, wait_seconds=1e9)
        assert coordinator.run(1, tmp_path) == Ending(0, "")
        b = Node(coordinator.place, "b")
        wait_until(lambda: not coordinator._new_links.empty())
        assert coordinator.run(2, tmp_path) == Ending(0, "")
        assert [start["place"][:2] for start in b.starts] == [[1, 2]]


def test_a_process_that_was_suspended_does_not_take_the_other_end_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ends: list[Link] = []
    thread = threading.Thread(target=lambda: ends.append(Link(theirs, b"s", is_coordinator=False)))
    thread.start()
    link = Link(ours, b"s", is_coordinator=True)
    thread.join()
    now = time.monotonic()
    clock = [now]
    monkeypatch.setattr(link_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for _ in range(20):  # nothing comes, while it looks
        clock[0] += 1
        link.receive()
    silence = link.silence_seconds
    assert 19 <= silence <= 21
    clock[0] += 600  # suspended
    link.receive()
    assert link.silence_seconds == pytest.approx(silence)

"""The line between a coordinator and its machines lets nobody in who does not know the secret."""

import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from spade_t5.launch import link
from spade_t5.launch.link import Link, LinkLostError

SECRET = b"the secret of this launch"


def join(other: Callable[[socket.socket], object]) -> Link:
    """The coordinator's end of a connection whose other end is played by a function in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    threading.Thread(target=other, args=(theirs,), daemon=True).start()
    return Link(ours, SECRET, is_coordinator=True)


def test_messages_pass_between_those_who_know_the_secret() -> None:
    ends: list[Link] = []
    ours = join(lambda theirs: ends.append(Link(theirs, SECRET, is_coordinator=False)))
    while not ends:
        time.sleep(0.01)
    ours.send({"do": "start", "attempt": 1})
    ours.beat()
    while not (messages := ends[0].receive()):
        time.sleep(0.01)
    assert messages == [{"do": "start", "attempt": 1}]
    assert ours.receive() == []
    assert ours.peer_address == ends[0].local_address == "127.0.0.1"
    ends[0].close()
    time.sleep(0.1)
    with pytest.raises(LinkLostError):
        ours.receive()


@pytest.mark.parametrize(
    "stranger",
    [
        lambda theirs: Link(theirs, b"a guess", is_coordinator=False),
        lambda theirs: theirs.sendall(b"GET / HTTP/1.0\r\n\r\n"),
        lambda theirs: theirs.sendall(b"\x7f\xff\xff\xff" + b"x" * 2**16),
        lambda theirs: theirs.close(),
        lambda theirs: time.sleep(5),
    ],
    ids=["guess", "web", "long", "closed", "silent"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_strangers_are_turned_away(
    stranger: Callable[[socket.socket], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "INTRODUCTION_SECONDS", 1.0)
    with pytest.raises(LinkLostError):
        join(stranger)


@pytest.mark.parametrize("block", [b"no json", b"[]", b"{}", b"\x80\x04."])
def test_what_is_no_message_ends_the_line(block: bytes) -> None:
    def send(theirs: socket.socket) -> None:
        end = Link(theirs, SECRET, is_coordinator=False)
        connection: Connection = end._connection
        connection.send_bytes(block)
        time.sleep(5)

    ours = join(send)
    time.sleep(0.2)
    with pytest.raises(LinkLostError):
        ours.receive()

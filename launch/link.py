"""The line between a launch's coordinator and its machines: JSON messages over TCP, between processes that share a secret.

Python's `multiprocessing.connection` frames them and has both ends prove that they know the secret; only its byte messages are used, never its pickles.
"""

import json
import socket
import struct
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

Message = dict[str, Any]

BEAT_SECONDS = 1.0
"""Between two signs of life."""
INTRODUCTION_SECONDS = 10.0
"""How long a new connection has to prove itself."""
PAUSE_SECONDS = 3.0
"""A process that has not looked at its connections for so long was suspended, or did something else; the other end is not silent for that."""
MAX_MESSAGE_BYTES = 2**24
"""Longest message that is read."""


class LinkLostError(Exception):
    """The other end is gone; the text says how that is known."""


class LinkRefusedError(LinkLostError):
    """The other end has another secret."""


class Link:
    """One connection whose other end knows the secret."""

    def __init__(self, connected: socket.socket, secret: bytes, *, is_coordinator: bool) -> None:
        """Proves to the other end that this one knows the secret, and has it do likewise.

        Raises:
            LinkRefusedError: the other end says that the secret is another.
            LinkLostError: it does not answer, or has nothing to do with launches.
        """
        self.local_address: str = connected.getsockname()[0]
        self.peer_address: str = connected.getpeername()[0]
        connected.setblocking(True)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_timeout(connected, INTRODUCTION_SECONDS)
        self._connection = Connection(connected.detach())
        proofs = (deliver_challenge, answer_challenge)
        try:
            for proof in proofs if is_coordinator else reversed(proofs):
                proof(self._connection, secret)
        except AuthenticationError:
            self.close()
            raise LinkRefusedError("what answers there has another secret than this launch") from None
        except Exception as error:  # whatever a stranger sends
            self.close()
            raise LinkLostError(f"{type(error).__name__}: {error}") from None
        self._heard_at = self._looked_at = time.monotonic()
        self._beat_at = 0.0

    def send(self, message: Message) -> None:
        """Sends a message.

        Raises:
            LinkLostError: the other end is gone.
        """
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except (OSError, ValueError) as error:
            raise LinkLostError(str(error)) from None

    def beat(self) -> None:
        """Gives a sign of life, if it is time for one."""
        now = time.monotonic()
        if now - self._beat_at >= BEAT_SECONDS:
            self._beat_at = now
            self.send({"do": "beat"})

    def receive(self) -> list[Message]:
        """What has come since the last call, without waiting.

        Raises:
            LinkLostError: the other end is gone.
        """
        messages = []
        now = time.monotonic()
        if now - self._looked_at > PAUSE_SECONDS:
            self._heard_at += now - self._looked_at
        self._looked_at = now
        try:
            while self._connection.poll():
                message = json.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
                self._heard_at = time.monotonic()
                if message["do"] != "beat":
                    messages.append(message)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            if not messages:  # what came before is handed out first
                raise LinkLostError(str(error)) from None
        return messages

    @property
    def silence_seconds(self) -> float:
        """How long nothing has come while this process looked."""
        return time.monotonic() - self._heard_at

    def close(self) -> None:
        """Closes the connection."""
        with suppress(OSError):
            self._connection.close()


def _set_timeout(connected: socket.socket, seconds: float) -> None:
    """Has reads and writes of a blocking socket fail after so long; Python's own timeouts are lost with its socket object."""
    value = struct.pack("ll", int(seconds), 0)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connected.setsockopt(socket.SOL_SOCKET, option, value)

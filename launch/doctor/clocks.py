"""How far the clock of each node is from that of the main rank's.

A node asks the main rank for its time; the answer was given somewhere between question and receipt, so that

    offset = (sent + received) / 2 - answer        uncertain by (received - sent) / 2

Of several questions the fastest counts.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

_QUESTIONS = 10


def measure_clocks(speakers: list[int]) -> dict[str, Any]:
    """Compares clocks between the main rank and each other node's, one after the other (a collective call of these ranks).

    Args:
        speakers: one rank of each node, the main rank first.

    Returns:
        facts of this rank's node, in seconds: `clock_offset`, positive where its clock is ahead, `clock_uncertainty`, and `round_trip`, the
        shortest time of a question and its answer. For the main rank, and ranks that speak for no node, nothing.
    """
    own = dist.get_rank() if dist.is_initialized() else 0
    main, *others = speakers
    for other in others:
        if own == main:
            _answer(other)
        elif own == other:
            return _ask(main)
    return {}


def _answer(asker: int) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_QUESTIONS):
        dist.recv(message, asker)
        message.fill_(time.time())
        dist.send(message, asker)


def _ask(main: int) -> dict[str, Any]:
    message = torch.zeros(1, dtype=torch.float64)
    answers = []
    for _ in range(_QUESTIONS):
        begin, sent = time.perf_counter(), time.time()
        dist.send(message, main)
        dist.recv(message, main)
        seconds = time.perf_counter() - begin
        answers.append((seconds, sent + seconds / 2 - message.item()))
    seconds, offset = min(answers)
    return {"clock_offset": offset, "clock_uncertainty": seconds / 2, "round_trip": seconds}

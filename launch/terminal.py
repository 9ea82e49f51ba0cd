"""What a launcher writes to its standard output and error, which may have been closed."""

import os

from spade_t5.messages import one_line


def say(message: str) -> None:
    """A message of the launcher."""
    write(2, f"spade-t5 launch: {one_line(message)}\n".encode(errors="backslashreplace"))


def write(stream: int, block: bytes) -> bool:
    """Writes to the standard output or error; whether it can still be written: its reader, or the terminal, may be gone."""
    try:
        while block:
            block = block[os.write(stream, block) :]
    except OSError:
        return False
    return True

"""The commands of the documentation, for tests to run or to read: what a page says is what was tried."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def commands(page: str) -> list[str]:
    """Every line of the page's blocks for a shell; a comment behind it is left out, and a line that goes on on the next is one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = (line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines())
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.strip()]


def program_commands(page: Path) -> list[list[str]]:
    """Words behind `spade-t5` of every command that stands on a line of its own, in whatever block, with a prompt or without."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(?:\$ | {4})?spade-t5 ([a-z]+(?: .*)?)$", text, re.MULTILINE)
    return [shlex.split(re.sub(r"\s+#.*", "", line).partition(" > ")[0]) for line in lines]


def command(page: str, start: str, changes: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Words of the page's first command that begins so, without the name of the program and where its output goes.

    Args:
        page: file in `docs/`.
        start: beginning of the line.
        changes: words to be put in place of one.

    Raises:
        AssertionError: there is no such command, or it has not all words that are to be changed.
    """
    line = next((line for line in commands(page) if line.startswith(start)), None)
    assert line is not None, f"{page}: no command begins with {start}"
    words = shlex.split(line.partition(" > ")[0])
    missing = [word for word in changes or () if word not in words]
    assert not missing, f"{page}: {missing} not in {words}"
    return [new for word in words[1:] for new in (changes or {}).get(word, [word])]

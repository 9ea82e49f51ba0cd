"""The commands of the documentation, for tests to run: what a page says is what was tried."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def commands(page: str) -> list[str]:
    """Every line of the page's bash blocks; a comment behind it is left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for block in blocks for line in block.splitlines() if line.strip()]


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

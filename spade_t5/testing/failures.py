"""Holds what a program says to what the failure cookbook says."""

import re
from pathlib import Path

COOKBOOK = Path(__file__).resolve().parents[2] / "docs" / "failures.md"


def documented(text: str) -> None:
    """Asserts that `text` holds a message of docs/failures.md: a line of one of its text blocks, where … stands for anything on one line."""
    blocks = re.findall(r"^```text\n(.*?)^```$", COOKBOOK.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    messages = [line for block in blocks for line in block.splitlines() if line.strip()]
    patterns = [".+?".join(re.escape(part) for part in message.split("…")) for message in messages]
    assert any(re.search(pattern, text) for pattern in patterns), f"not in {COOKBOOK.name}: {text}"

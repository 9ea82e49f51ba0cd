"""Ranks that end as they begin: what a launcher makes of that needs no training."""

import os
from pathlib import Path

_HOOK = """
import os, signal, sys
def end(event, arguments):
    if event == "import" and arguments[0] == "spade_t5":
        {action}
if "LOCAL_RANK" in os.environ:
    sys.addaudithook(end)
"""
_ACTIONS = {1: 'raise RuntimeError("broken on purpose")', 75: "os.kill(os.getpid(), signal.SIGTERM)"}


def ranks_that_end(folder: Path, code: int) -> dict[str, str]:
    """Variables for a launcher whose ranks all end before they import this package.

    Args:
        folder: an empty one, for what does it.
        code: 1 for ranks that fail, 75 for ranks that are asked to stop.
    """
    (folder / "sitecustomize.py").write_text(_HOOK.format(action=_ACTIONS[code]), encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

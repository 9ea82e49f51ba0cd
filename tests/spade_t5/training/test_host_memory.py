"""Memory of a large tensor is used again: no page is mapped a second time."""

import json
import platform
import sys

import pytest

from spade_t5.testing import run_command

CODE = """
import json, resource, sys, torch
from spade_t5.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults() for _ in range(6)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is tuned")
def test_freed_memory_is_used_again() -> None:
    kept, returned = (
        json.loads(run_command([sys.executable, "-c", CODE, mode]).stdout) for mode in ("keep", "default")
    )
    assert kept[-1] * 10 < returned[-1]

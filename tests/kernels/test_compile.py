"""Every kernel compiles for Ampere and Hopper, without a GPU: no spills, shared memory within the chip, tensor cores used.

Both the installed Triton and the oldest supported one compile; the latter's interpreter is named by
SPADE_T5_TRITON_MIN_PYTHON (`make triton-min` makes it).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spade_t5.kernels import backend

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.parent.name for path in Path(backend.__file__).parent.glob("*/triton_op.py"))
SHARED_BYTES = {90: 232448, 80: 166912}
WGMMA_KERNELS = (
    "local_attention_fwd_kernel",
    "local_attention_bwd_dkdv_kernel",
    "local_attention_bwd_dq_kernel",
    "ssm_chunk_states_kernel",
    "ssm_chunk_outputs_kernel",
    "ssm_chunk_dlocal_kernel",
    "ssm_chunk_dstates_kernel",
)


def compiled(python: str, architecture: int, op: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [python, "-m", "spade_t5.testing.compile_kernels", "--arch", str(architecture), "--op", op],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def pythons() -> list[Any]:
    oldest = os.environ.get("SPADE_T5_TRITON_MIN_PYTHON")
    reason = "SPADE_T5_TRITON_MIN_PYTHON is not set: `make triton-min` makes an environment with the oldest Triton"
    return [
        pytest.param(sys.executable, id="installed"),
        pytest.param(oldest, id="oldest", marks=pytest.mark.skipif(not oldest, reason=reason)),
    ]


@pytest.mark.skipif(not backend._HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("python", pythons())
def test_compiles_within_the_limits_of_the_chip(python: str, architecture: int, op: str) -> None:
    report = compiled(python, architecture, op)
    assert report
    for kernel in report:
        what = f"{kernel['case']} {kernel['kernel']} {kernel['options']} {kernel['blocks']}"
        assert kernel["ldl"] == kernel["stl"] == kernel["stack_bytes"] == 0, f"{what}: spills {kernel}"
        assert kernel["shared_bytes"] <= SHARED_BYTES[architecture], f"{what}: {kernel['shared_bytes']} bytes"
        assert kernel["atomg"] == kernel["red"] == 0, f"{what}: atomics"
        if architecture == 90 and kernel["kernel"] in WGMMA_KERNELS and "float32" not in kernel["case"]:
            assert kernel["hgmma"] > 0, f"{what}: not on the tensor cores of Hopper"

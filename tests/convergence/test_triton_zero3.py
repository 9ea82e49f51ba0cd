"""The Triton path under ZeRO 3 on two processes, with accumulation, checkpointing, and a micro-batch of padding alone."""

import json
from pathlib import Path

import pytest

from spade_t5.kernels import backend
from spade_t5.testing import torchrun

WORKER = str(Path(__file__).with_name("zero3_worker.py"))


@pytest.mark.skipif(not backend._HAS_TRITON, reason="triton is not installed")
def test_two_ranks_agree_with_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    found = {}
    for name in ("naive", "triton"):
        env = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        done = torchrun([WORKER, str(tmp_path / name), name], num_ranks=2, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert len(found["naive"]) == 2
    for actual, expected in zip(found["triton"], found["naive"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)

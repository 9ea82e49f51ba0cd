"""Choice of backend: argument, then environment, then auto; what cannot serve says why."""

import logging

import pytest
import torch

from spade_t5 import ops
from spade_t5.errors import ConfigError
from spade_t5.kernels import backend


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPADE_T5_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_configured", "auto")
    ops._announced.cache_clear()


def test_auto_is_torch_and_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="spade_t5.ops"):
        assert [ops.backend_in_use(), ops.backend_in_use("auto")] == ["torch", "torch"]
    assert [record.message for record in caplog.records] == [
        "SPADE-T5 ops run on backend 'torch' (device cpu, environment variable SPADE_T5_BACKEND=auto)"
    ]


def test_environment_chooses_and_argument_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPADE_T5_BACKEND", "naive")
    assert ops.backend_in_use() == "naive"
    assert ops.backend_in_use("torch") == "torch"


def test_config_wins_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPADE_T5_BACKEND", "naive")
    cpu = torch.device("cpu")
    ops.configure_backend("torch", cpu)
    assert ops.backend_in_use() == "torch"
    with pytest.raises(ConfigError, match=r"kernel_backend: backend='flash' is unknown; use one of 'auto', 'triton'"):
        ops.configure_backend("flash", cpu)
    monkeypatch.setattr(backend, "_IS_INTERPRETED", False)
    with pytest.raises(ConfigError, match=r"kernel_backend: backend='triton': Triton kernels cannot run: .* on cpu"):
        ops.configure_backend("triton", cpu)
    assert ops.backend_in_use() == "torch"


def test_a_backend_that_cannot_serve_reaches_every_op_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 4, 1, 2)
    monkeypatch.setenv("SPADE_T5_BACKEND", "triton")
    monkeypatch.setattr(backend, "_IS_INTERPRETED", False)
    calls = [
        lambda: ops.local_attention(q, q, q, None, left=1, right=1),
        lambda: ops.ssm_conv(torch.zeros(1, 4, 2), torch.zeros(2, 2, 4), torch.zeros(2)),
        lambda: ops.rms_norm(q, torch.ones(2), 1e-6),
        lambda: ops.gated_gelu(q, q),
    ]
    for call in calls:
        with pytest.raises(
            ConfigError, match=r"SPADE_T5_BACKEND: backend='triton': .* on cpu .* choose backend 'torch'"
        ):
            call()
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with pytest.raises(ConfigError, match=r"the package triton is not installed; run `pip install triton`"):
        ops.backend_in_use("auto", torch.device("cuda"))


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='flash' is unknown; use one of 'auto', 'triton', 'torch', 'naive'"):
        ops.backend_in_use("flash")

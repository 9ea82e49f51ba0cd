"""Mixers in chunks: the same system as the impulse response, every parameter's gradient through Triton, and caching."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from spade_t5.kernels import backend
from spade_t5.kernels.ssm_conv import impulse_response, ssm_conv_naive
from spade_t5.layers import ssm
from spade_t5.layers.ssm import S4, S4D, SSMMixer
from spade_t5.testing.kernels import assert_near

F64 = torch.float64
MIXERS = [S4, S4D]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

needs_triton = pytest.mark.skipif(not backend._HAS_TRITON, reason="triton is not installed")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPADE_T5_BACKEND", "triton")


def make(
    mixer: type[SSMMixer], d_model: int = 2, *, d_state: int = 8, dt_min: float = 1e-3, **options: Any
) -> SSMMixer:
    module = mixer(d_model, d_state=d_state, dt_min=dt_min, dt_max=0.1, **options)
    module.init_parameters(torch.Generator().manual_seed(0))
    return module


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).float()


def packed(length: int) -> Tensor:
    """Documents that begin inside chunks, one of a single token, padding in front, inside and behind."""
    ids = [0] * 3 + [1] * 21 + [0] * 2 + [1] * 5 + [2] + [3] * (length - 36) + [0] * 4
    return torch.tensor([ids, [1] * length])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tokens", [1, 16, 256])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_system_has_the_impulse_response_of_the_mixer(mixer: type[SSMMixer], tokens: int, bidirectional: bool) -> None:
    module = make(mixer, 3, d_state=64, bidirectional=bidirectional).double()
    expected = module.ssm_kernel(600)
    expected[0, :, 0] += module.D
    system = module.chunked_system(tokens)
    assert system is not None
    assert (system.chunk_tokens, system.num_states, system.num_sides) == (tokens, 64, module.num_sides)
    torch.testing.assert_close(
        impulse_response(system, 600), expected, rtol=0, atol=1e-13 * expected.abs().max().item()
    )


@needs_triton
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("training_mode", ["frozen", "output", "full"])
@pytest.mark.parametrize(("length", "bidirectional"), [(65, True), (63, False)])
def test_every_gradient_through_triton(
    mixer: type[SSMMixer], training_mode: str, length: int, bidirectional: bool, triton: None
) -> None:
    module = make(mixer, bidirectional=bidirectional, training_mode=training_mode).to(DEVICE)
    exact = make(mixer, bidirectional=bidirectional, training_mode=training_mode).to(DEVICE).double()
    segment_ids, upstream = packed(length).to(DEVICE), randn(2, length, 2, seed=3).to(DEVICE)
    x, x_exact = (randn(2, length, 2).to(DEVICE, dtype).requires_grad_() for dtype in (torch.float32, F64))
    y = module(x, segment_ids)
    y.backward(upstream)
    expected = ssm_conv_naive(x_exact, exact.ssm_kernel(length), exact.D, segment_ids)
    expected.backward(upstream.double())

    assert_near("y", y, expected)
    assert x.grad is not None
    assert x_exact.grad is not None
    assert_near("dx", x.grad, x_exact.grad)
    for (name, p), p_exact in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad is None) == (not p.requires_grad)
        if p.grad is not None and p_exact.grad is not None:
            assert_near(name, p.grad, p_exact.grad)


@needs_triton
@pytest.mark.parametrize("mixer", MIXERS)
def test_trained_in_bfloat16(mixer: type[SSMMixer], triton: None) -> None:
    module, exact = make(mixer, training_mode="full"), make(mixer, training_mode="full").double()
    x = randn(2, 65, 2).bfloat16()
    upstream = randn(2, 65, 2, seed=3).bfloat16()
    module(x).backward(upstream)
    ssm_conv_naive(x.double(), exact.ssm_kernel(65), exact.D).backward(upstream.double())
    for (name, p), p_exact in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert p_exact.grad is not None
        assert_near(name, p.grad, p_exact.grad, 1e-2)


@needs_triton
def test_frozen_system_is_made_once_for_each_chunk_size_and_precision(
    monkeypatch: pytest.MonkeyPatch, triton: None
) -> None:
    module = make(S4)
    made: list[int] = []
    compute = module.chunked_system
    monkeypatch.setattr(module, "chunked_system", lambda tokens: made.append(tokens) or compute(tokens))
    monkeypatch.setattr(ssm.ops, "ssm_chunk_tokens", lambda length, device: 16 if length < 40 else 32)
    for length, dtype in ((20, torch.float32), (30, torch.float32), (50, torch.float32), (20, torch.bfloat16)) * 2:
        assert module(randn(1, length, 2).to(dtype)).dtype == dtype
    assert made == [16, 32, 16]
    assert not list(module.buffers())
    before = module(randn(1, 20, 2))
    with torch.no_grad():
        module.C.mul_(2.0)
    assert not torch.equal(module(randn(1, 20, 2)), before)
    assert made == [16, 32, 16, 16]


@needs_triton
def test_system_cached_in_inference_mode_serves_training(triton: None) -> None:
    module = make(S4D)
    with torch.inference_mode():
        module(randn(1, 20, 2))
    x = randn(1, 20, 2).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


@needs_triton
def test_autocast_reaches_the_convolution_but_not_the_system(triton: None) -> None:
    module, x = make(S4, training_mode="full"), randn(1, 65, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module(x.bfloat16()))


@needs_triton
def test_a_mixer_without_a_system_runs_on_torch_and_says_so(triton: None, caplog: pytest.LogCaptureFixture) -> None:
    class Plain(S4D):
        def chunked_system(self, chunk_tokens: int) -> None:
            return None

    module, x = make(Plain), randn(1, 20, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(module(x), make(S4D)(x), rtol=0, atol=1e-5)
    assert [r.getMessage() for r in caplog.records] == [
        "Plain has no chunked system: its convolution runs on backend 'torch'"
    ]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dt_min", [1e-3, 1e-4])
def test_matrices_stay_far_inside_the_range_of_float16(mixer: type[SSMMixer], dt_min: float) -> None:
    """At both ranges of the step that the presets use, for many draws of C: no overflow, no loss below 2^-14."""
    system = make(mixer, 256, d_state=64, dt_min=dt_min).chunked_system(256)
    assert system is not None
    for name, matrix in system._asdict().items():
        assert 2.0**-6 < matrix.abs().max() < 2.0**8, name
    for matrix in (system.w, system.p):
        # What float16 cannot hold as a normal number is no part of any channel's norm.
        small = torch.where(matrix.abs() < 2.0**-14, matrix, 0.0)
        assert (small.flatten(1).norm(dim=1) < 1e-2 * matrix.flatten(1).norm(dim=1)).all()
    if mixer is S4:
        assert (torch.linalg.matrix_norm(system.transition.double(), ord=2) < 1.0).all()

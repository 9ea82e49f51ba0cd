"""Global mixers: what they compute over long distances, what trains, and how parameters survive casts and loads."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spade_t5.layers.ssm import GLOBAL_MIXERS, S4, S4D, SSMMixer, register_mixer

F64 = torch.float64
MIXERS = [S4, S4D]


def make(
    mixer: type[SSMMixer], d_model: int = 4, *, seed: int = 0, dt_min: float = 1e-3, **options: object
) -> SSMMixer:
    module = mixer(d_model, dt_min=dt_min, dt_max=0.1, **options)
    module.init_parameters(torch.Generator().manual_seed(seed))
    return module


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def test_registry_and_parameter_count() -> None:
    assert GLOBAL_MIXERS["s4"] is S4
    assert GLOBAL_MIXERS["s4d"] is S4D
    with pytest.raises(ValueError, match="global mixer 's4' is S4 already"):
        register_mixer("s4")(S4)
    shapes = {name: tuple(p.shape) for name, p in make(S4, 768).named_parameters()}
    pairs = (768, 32, 2)
    assert shapes == {"log_dt": (768,), "A": pairs, "P": pairs, "B": pairs, "C": (2, *pairs), "D": (768,)}
    assert all(p.is_contiguous() and not p.is_complex() for p in make(S4, 768).parameters())


def test_initial_distributions() -> None:
    mixer = make(S4, 2000)
    assert mixer.log_dt.exp().min() >= 1e-3
    assert mixer.log_dt.exp().max() <= 0.1
    # Uniform in the logarithm: the median is the geometric mean, 0.01, within its sampling error.
    assert 0.008 < mixer.log_dt.exp().median() < 0.0125
    assert abs(mixer.C.square().sum(dim=-1).mean() - 1.0) < 0.02
    assert abs(mixer.D.square().mean() - 1.0) < 0.1


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [1, 63, 300])
def test_equals_the_sum_over_lags(mixer: type[SSMMixer], length: int) -> None:
    module = make(mixer, 3).double()
    x = randn(1, length, 3, dtype=F64)
    k0, k1 = module.ssm_kernel(length)
    expected = module.D * x[0]
    for t in range(length):
        for lag in range(-length + 1, length):
            if 0 <= t - lag < length:
                expected[t] += (k0[:, lag] if lag >= 0 else k1[:, -lag - 1]) * x[0, t - lag]
        if length > 63 and t == 20:
            break
    rows = slice(0, 21) if length > 63 else slice(None)
    torch.testing.assert_close(module(x)[0, rows], expected[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", MIXERS)
def test_causal_form_does_not_look_ahead(mixer: type[SSMMixer]) -> None:
    module = make(mixer, bidirectional=False).double()
    x = randn(1, 50, 4, dtype=F64)
    changed = x.clone()
    changed[0, 30] += 1.0
    difference = (module(changed) - module(x))[0].abs().amax(dim=1)
    assert difference[:30].max() < 1e-12
    assert difference[30:].min() > 1e-6


@pytest.mark.parametrize("mixer", MIXERS)
def test_shift_equivariance_on_zero_extended_input(mixer: type[SSMMixer]) -> None:
    module = make(mixer).double()
    x = torch.zeros(1, 400, 4, dtype=F64)
    x[:, 100:200] = randn(1, 100, 4, dtype=F64)
    y, shifted = module(x), module(x.roll(57, dims=1))
    torch.testing.assert_close(shifted[:, 57:], y[:, :-57], rtol=0, atol=1e-11)


def relative_reach(respond: Callable[[Tensor], Tensor], distance: int) -> tuple[float, float]:
    """Change of the output `distance` tokens or more before and behind a changed token, relative to that at it."""
    length, middle = 5001, 2500
    x = randn(1, length, 8, dtype=F64)
    changed = x.clone()
    changed[0, middle] += 1.0
    difference = (respond(changed) - respond(x))[0].abs().amax(dim=1)
    before, behind = difference[: middle - distance].max(), difference[middle + distance + 1 :].max()
    return float(before / difference[middle]), float(behind / difference[middle])


def test_reaches_beyond_two_thousand_tokens_on_both_sides() -> None:
    module = make(S4, 8, dt_min=1e-4).double()
    assert min(relative_reach(module, 2000)) >= 1e-3


def test_a_truncated_kernel_does_not_reach_that_far() -> None:
    """The same measure finds the released code's truncation at its maximal length."""
    module = make(S4, 8, dt_min=1e-4).double()
    full_kernel = module.ssm_kernel

    def truncated(length: int) -> Tensor:
        kernel = full_kernel(length).clone()
        kernel[:, :, 1000:] = 0.0
        return kernel

    module.ssm_kernel = truncated  # type: ignore[method-assign]
    assert max(relative_reach(module, 2000)) < 1e-9
    assert min(relative_reach(module, 900)) >= 1e-3


def test_packed_row_equals_separate_documents() -> None:
    module = make(S4).double()
    x = randn(1, 120, 4, dtype=F64)
    segment_ids = torch.tensor([[0] * 3 + [1] * 50 + [2] + [0] * 4 + [3] * 60 + [0] * 2])
    y = module(x, segment_ids)
    for start, length in ((3, 50), (53, 1), (58, 60)):
        part = slice(start, start + length)
        torch.testing.assert_close(y[:, part], module(x[:, part]), rtol=0, atol=1e-12)
    assert (y[segment_ids == 0] == 0).all()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    ("training_mode", "trained"),
    [("frozen", set()), ("output", {"C", "D"}), ("full", {"log_dt", "A", "P", "B", "C", "D"})],
)
def test_training_modes(mixer: type[SSMMixer], training_mode: str, trained: set[str]) -> None:
    module = make(mixer, training_mode=training_mode)
    x = randn(2, 30, 4).requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    names = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert names == trained & {name for name, _ in module.named_parameters()}


def test_frozen_and_trained_modes_compute_the_same() -> None:
    x = randn(1, 100, 4)
    reference = make(S4)(x)
    for training_mode in ("output", "full"):
        torch.testing.assert_close(make(S4, training_mode=training_mode)(x), reference, rtol=0, atol=1e-5)


def test_frozen_kernel_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(S4)
    lengths: list[int] = []
    compute = module.ssm_kernel
    monkeypatch.setattr(module, "ssm_kernel", lambda length: lengths.append(length) or compute(length))
    for length in (100, 100, 128, 65, 129, 100):
        module(randn(1, length, 4))
    assert lengths == [128, 256]


def test_kernel_of_a_length_does_not_depend_on_lengths_seen_before() -> None:
    x = randn(1, 100, 4)
    fresh, used = make(S4), make(S4)
    used(randn(1, 3000, 4))
    assert torch.equal(fresh(x), used(x))


def _load(module: SSMMixer, other: SSMMixer) -> None:
    module.load_state_dict(other.state_dict())


def _copy_in_place(module: SSMMixer, other: SSMMixer) -> None:
    with torch.no_grad():
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            p.copy_(q)


def _replace_parameters(module: SSMMixer, other: SSMMixer) -> None:
    for name, q in other.named_parameters():
        setattr(module, name, torch.nn.Parameter(q.detach().clone()))


def _reinitialise(module: SSMMixer, other: SSMMixer) -> None:
    module.init_parameters(torch.Generator().manual_seed(5))


def _write_data(module: SSMMixer, other: SSMMixer) -> None:
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        p.data.copy_(q.data)
    module.reset_cache()


@pytest.mark.parametrize("change", [_load, _copy_in_place, _replace_parameters, _reinitialise, _write_data])
def test_cached_kernel_is_dropped_when_parameters_change(change: Callable[[SSMMixer, SSMMixer], None]) -> None:
    x = randn(1, 60, 4)
    module, other = make(S4, seed=0), make(S4, seed=5)
    before = module(x)
    change(module, other)
    assert not torch.equal(before, other(x))
    assert torch.equal(module(x), other(x))
    assert all(not p.requires_grad and p._is_ssm for p in module.parameters())


def test_kernel_cached_in_inference_mode_serves_training() -> None:
    module = make(S4)
    with torch.inference_mode():
        module(randn(1, 40, 4))
    x = randn(1, 40, 4).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


def test_nothing_derived_is_saved() -> None:
    module = make(S4)
    module(randn(1, 40, 4))
    assert set(module.state_dict()) == {"log_dt", "A", "P", "B", "C", "D"}
    assert not list(module.buffers())


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_parameters_stay_in_float32(mixer: type[SSMMixer], cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    module = make(mixer)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), module)
    x = randn(1, 90, 4)
    before, state = module(x), copy.deepcopy(module.state_dict())
    cast(model)
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    assert all(torch.equal(p, state[name]) and p._is_ssm for name, p in module.named_parameters())
    assert torch.equal(module(x), before)
    y = module(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    # Input and output are rounded to 8 bits.
    assert (y.float() - before).abs().max() < 0.02 * before.abs().max()


def test_double_works_and_reaches_the_kernel() -> None:
    module = make(S4).double()
    assert all(p.dtype == F64 for p in module.parameters())
    assert module(randn(1, 10, 4, dtype=F64)).dtype == F64
    torch.testing.assert_close(module(randn(1, 10, 4)).double(), module(randn(1, 10, 4).double()), rtol=0, atol=1e-5)


def test_default_dtype_of_half_precision_models_does_not_reach_the_parameters() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = make(S4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(module(randn(1, 20, 4)), make(S4)(randn(1, 20, 4)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_built_on_the_meta_device_and_filled_later(mixer: type[SSMMixer]) -> None:
    with torch.device("meta"):
        module = mixer(4, dt_min=1e-3, dt_max=0.1)
    assert all(p.is_meta and p._is_ssm for p in module.parameters())
    module.bfloat16()
    assert all(p.dtype == torch.float32 for p in module.parameters())
    module.to_empty(device="cpu")
    assert all(not p.requires_grad and p._is_ssm for p in module.parameters())
    module.init_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(module(randn(1, 20, 4)), make(mixer)(randn(1, 20, 4)))


def test_copies_keep_marks_and_results() -> None:
    module = make(S4, training_mode="output")
    module(randn(1, 20, 4))
    duplicate = copy.deepcopy(module)
    assert all(p._is_ssm for p in duplicate.parameters())
    assert torch.equal(duplicate(randn(1, 20, 4)), module(randn(1, 20, 4)))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="d_state=63 must be even"):
        S4(4, d_state=63, dt_min=1e-3, dt_max=0.1)
    with pytest.raises(ValueError, match=r"dt_min=0\.2, dt_max=0\.1"):
        S4(4, dt_min=0.2, dt_max=0.1)
    with pytest.raises(ValueError, match="training_mode='none' is unknown"):
        S4(4, dt_min=1e-3, dt_max=0.1, training_mode="none")


@pytest.mark.parametrize("name", ["s4", "s4d"])
def test_stretched_steps_are_those_that_the_new_range_would_have_drawn(name: str) -> None:
    mixers = []
    for dt_min, dt_max in ((1e-3, 0.1), (1e-4, 0.2)):
        mixer = GLOBAL_MIXERS[name](6, dt_min=dt_min, dt_max=dt_max)
        mixer.init_parameters(torch.Generator().manual_seed(3))
        mixers.append(mixer)
    before = mixers[0](torch.ones(1, 9, 6))
    mixers[0].stretch_steps(1e-4, 0.2)
    torch.testing.assert_close(mixers[0].log_dt, mixers[1].log_dt)
    after, expected = (mixer(torch.ones(1, 9, 6)) for mixer in mixers)  # no kernel of the old steps is kept
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-3)
    with pytest.raises(ValueError, match=r"dt_min=0\.2, dt_max=0\.1"):
        mixers[0].stretch_steps(0.2, 0.1)

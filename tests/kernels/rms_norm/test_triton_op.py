"""RMS norm by Triton, alone and after a residual sum with dropout, against the formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spade_t5.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_naive,
    add_rms_norm_with_transpose,
    rms_norm,
    rms_norm_naive,
    rms_norm_with_transpose,
)
from spade_t5.testing.kernels import assert_near, poisoned_allocations

EPS = 1e-6
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def normal(*shape: int, seed: int, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(device, dtype)


def backward_of(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of their sum weighted by fixed random numbers."""
    upstream = [normal(*y.shape, seed=70 + i, dtype=y.dtype, device=y.device.type) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def exact_of(function: Callable[..., Any], *tensors: Tensor, **arguments: float) -> list[Tensor]:
    leaves = [leaf(tensor.double()) for tensor in tensors]
    outputs = function(*leaves, EPS, **arguments)
    return backward_of(outputs if isinstance(outputs, tuple) else (outputs,), leaves)


def keep_mask(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """The scaled mask that add_rms_norm draws from the generator's seed."""
    torch.manual_seed(seed)
    ones = torch.ones_like(x, dtype=F32)
    return add_rms_norm(
        ones, torch.zeros_like(ones), ones.new_ones(x.shape[-1]), EPS, dropout_p=dropout_p, backend="triton"
    )[0].to(F64)


def assert_all_near(names: str, actual: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for name, one, other in zip(names.split(), actual, exact, strict=True):
        assert_near(name, one, other, bound={F32: 1e-5, F16: 1e-3, BF16: 1e-2}[dtype])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(6,), (1, 8), (17, 5), (2, 63, 130), (1, 65, 128), (3, 200, 64)])
def test_norm_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 3 * normal(*shape, seed=0, dtype=dtype), normal(shape[-1], seed=1, dtype=dtype)
    leaves = [leaf(x), leaf(weight)]
    with poisoned_allocations():
        actual = backward_of((rms_norm(*leaves, EPS, backend="triton"),), leaves)
    assert [tensor.dtype for tensor in actual] == [dtype] * 3
    assert_all_near("y dx dweight", actual, exact_of(rms_norm_naive, x, weight), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 17, 130), (1, 64, 48), (3, 65, 16), (1, 3, 1030)])
def test_transposed_input_and_second_output(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(*shape, seed=0, dtype=dtype), normal(shape[-1], seed=1)
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        leaves = [leaf(layout), leaf(weight.float())]
        with poisoned_allocations():
            y, y_t = rms_norm_with_transpose(*leaves, EPS, backend="triton")
            actual = backward_of((y, y_t), leaves)
        assert y.is_contiguous()
        assert y_t.transpose(1, 2).is_contiguous()
        assert torch.equal(y, y_t)
        exact = exact_of(lambda *leaves: (rms_norm_naive(*leaves),) * 2, x, weight.float())
        assert_all_near("y y_t dx dweight", actual, exact, dtype)
    assert actual[2].transpose(1, 2).is_contiguous() or shape[-1] > 1024


@pytest.mark.parametrize(("dtype", "residual_dtype"), [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F32, BF16)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7,), (2, 63, 24), (1, 65, 260)])
def test_sum_equals_the_formula(
    shape: tuple[int, ...], dropout_p: float, dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x, residual = normal(*shape, seed=0, dtype=dtype), normal(*shape, seed=1, dtype=residual_dtype)
    weight = normal(shape[-1], seed=2, dtype=F32)
    mask = keep_mask(x, dropout_p, seed=5)
    leaves = [leaf(x), leaf(residual), leaf(weight)]
    torch.manual_seed(5)
    with poisoned_allocations():
        outputs = add_rms_norm(*leaves, EPS, dropout_p=dropout_p, backend="triton")
        actual = backward_of(outputs, leaves)
    sum_dtype = torch.promote_types(dtype, residual_dtype)
    assert [tensor.dtype for tensor in actual] == [sum_dtype, sum_dtype, dtype, residual_dtype, F32]

    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm_naive(x * mask, residual, weight, eps)

    coarsest = BF16 if BF16 in (dtype, residual_dtype) else dtype
    assert_all_near("r y dx dresidual dweight", actual, exact_of(formula, x, residual, weight), coarsest)


def test_sum_with_transpose() -> None:
    x, residual, weight = normal(2, 33, 20, seed=0), normal(2, 33, 20, seed=1), normal(20, seed=2)
    leaves = [leaf(tensor.float()) for tensor in (x, residual, weight)]
    with poisoned_allocations():
        outputs = add_rms_norm_with_transpose(*leaves, EPS, backend="triton")
        actual = backward_of(outputs, leaves)
    assert outputs[2].transpose(1, 2).is_contiguous()

    def formula(*leaves: Tensor) -> tuple[Tensor, ...]:
        r, y = add_rms_norm_naive(*leaves)
        return r, y, y

    assert_all_near("r y y_t dx dresidual dweight", actual, exact_of(formula, *leaves), F32)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(used: int) -> None:
    leaves = [leaf(normal(*shape, seed=i, dtype=F32)) for i, shape in enumerate([(9, 12), (9, 12), (12,)])]
    output = add_rms_norm(*leaves, EPS, backend="triton")[used]
    expected = add_rms_norm_naive(*leaves, EPS)[used]
    actual, exact = (torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True) for y in (output, expected))
    for one, other in zip(actual, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_half_precision_errs_no_more_than_eager_pytorch() -> None:
    x, residual, weight = (normal(*shape, seed=i, dtype=BF16) for i, shape in enumerate([(90, 64), (90, 64), (64,)]))
    exact = exact_of(add_rms_norm_naive, x, residual, weight)
    leaves = [leaf(tensor) for tensor in (x, residual, weight)]
    eager = backward_of(add_rms_norm_naive(*leaves, EPS), leaves)
    ours = backward_of(add_rms_norm(*leaves, EPS, backend="triton"), leaves)
    for one, other, truth in zip(ours, eager, exact, strict=True):
        # Stores of the interpreter truncate bfloat16, which errs twice as much as rounding.
        assert (one - truth).abs().max() <= 2.0 * 2.0 * (other - truth).abs().max() + 1e-6


def test_mask_keeps_the_right_share_and_depends_on_row_column_and_seed() -> None:
    x = torch.empty(400, 250)
    mask, other = keep_mask(x, 0.25, seed=1), keep_mask(x, 0.25, seed=2)
    assert mask.unique().tolist() == [0.0, pytest.approx(4.0 / 3.0)]
    kept = (mask > 0).double()
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert torch.equal(mask, keep_mask(x, 0.25, seed=1))
    assert not torch.equal(mask, other)
    # Neighbours in any direction, and the four columns of one draw, agree as often as independent entries do.
    for shifted in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(2, 1), kept.roll(4, 1), (other > 0).double()):
        assert abs((kept == shifted).double().mean() - (0.75**2 + 0.25**2)) < 0.01


def test_two_runs_are_bitwise_equal_and_strides_do_not_matter() -> None:
    x, residual, weight = normal(3, 40, 24, seed=0, dtype=F32), normal(3, 40, 24, seed=1, dtype=F32), normal(24, seed=2)
    wide = torch.cat([x, x], dim=-1)
    weight = weight.float().repeat_interleave(2)[::2]
    results = []
    for layout in (x, x, wide[..., :24], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        torch.manual_seed(3)
        leaves = [leaf(layout), leaf(residual), leaf(weight)]
        results.append(backward_of(add_rms_norm(*leaves, EPS, dropout_p=0.1, backend="triton"), leaves))
    for other in results[1:]:
        for one, again in zip(results[0], other, strict=True):
            assert torch.equal(one, again)


def test_operators_pass_pytorchs_own_checks() -> None:
    x, residual, weight = (leaf(normal(*s, seed=i, dtype=F32)) for i, s in enumerate([(2, 5, 8), (2, 5, 8), (8,)]))
    for is_transposed, with_transpose in ((False, False), (True, True)):
        given = (leaf(x.transpose(1, 2).contiguous()) if is_transposed else x, weight)
        torch.library.opcheck(torch.ops.spade_t5.rms_norm, (*given, EPS, is_transposed, with_transpose))
    seed = torch.tensor([7])
    torch.library.opcheck(torch.ops.spade_t5.add_rms_norm, (x, residual, weight, None, EPS, 0.0, False))
    torch.library.opcheck(torch.ops.spade_t5.add_rms_norm, (x, residual.bfloat16(), weight, seed, EPS, 0.5, True))


def test_is_one_node_of_a_compiled_graph() -> None:
    leaves = [leaf(normal(*s, seed=i, dtype=F32)) for i, s in enumerate([(2, 5, 8), (2, 5, 8), (8,)])]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, y_t = rms_norm_with_transpose(leaves[0], leaves[2], EPS, backend="triton")
        r, z = add_rms_norm(y_t, leaves[1], leaves[2], EPS, backend="triton")
        return y, r, rms_norm(z.mT.contiguous().mT, leaves[2], EPS, backend="triton")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(backward_of(compiled(*leaves), leaves), backward_of(function(*leaves), leaves), strict=True):
        assert torch.equal(one, other)


def test_checkpointing_draws_the_same_mask_again() -> None:
    leaves = [leaf(normal(*s, seed=i, dtype=F32)) for i, s in enumerate([(9, 8), (9, 8), (8,)])]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(*leaves, EPS, dropout_p=0.4, backend="triton")

    torch.manual_seed(0)
    plain = backward_of(function(*leaves), leaves)
    torch.manual_seed(0)
    again = backward_of(checkpoint(function, *leaves, use_reentrant=False), leaves)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_frozen_weight_and_autocast() -> None:
    x, residual, weight = (normal(*s, seed=i, dtype=F32) for i, s in enumerate([(9, 8), (9, 8), (8,)]))
    with torch.autocast("cpu", BF16):
        branch = torch.nn.functional.linear(x, torch.eye(8))
        r, y = add_rms_norm(branch, leaf(residual), weight, EPS, backend="triton")
        assert (branch.dtype, r.dtype, y.dtype) == (BF16, F32, F32)
    stream = leaf(residual)
    r, y = add_rms_norm(x, stream, weight, EPS, backend="triton")
    expected = add_rms_norm_naive(x, stream, weight, EPS)
    (actual,) = torch.autograd.grad((r * y).sum(), stream)
    torch.testing.assert_close(actual, torch.autograd.grad((expected[0] * expected[1]).sum(), stream)[0])


def test_wrong_use_is_refused() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"residual is float64: the Triton kernels take float32"):
        add_rms_norm(x, x.double(), weight, EPS, backend="triton")
    with pytest.raises(ValueError, match=r"x has 20000 columns; the Triton kernels take 8192: use backend 'torch'"):
        rms_norm(torch.ones(1, 20000), torch.ones(20000), EPS, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("d_model", [128, 768, 2048, 8192])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_gpu_sizes(d_model: int, dropout_p: float) -> None:
    shape = (3, 1111, d_model)
    x, residual = (normal(*shape, seed=i, dtype=BF16, device="cuda") for i in range(2))
    weight = normal(d_model, seed=2, dtype=F32, device="cuda")
    mask = keep_mask(x, dropout_p, seed=5)
    leaves = [leaf(x), leaf(residual), leaf(weight)]
    torch.manual_seed(5)
    with poisoned_allocations():
        outputs = add_rms_norm_with_transpose(*leaves, EPS, dropout_p=dropout_p, backend="triton")
        actual = backward_of(outputs, leaves)

    def formula(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        r, y = add_rms_norm_naive(x * mask, residual, weight, eps)
        return r, y, y

    assert_all_near("r y y_t dx dresidual dweight", actual, exact_of(formula, x, residual, weight), BF16)
    transposed = leaf(x.mT.contiguous().mT)
    actual = backward_of((rms_norm(transposed, leaves[2], EPS),), [transposed, leaves[2]])
    assert_all_near("y dx dweight", actual, exact_of(rms_norm_naive, x, weight), BF16)

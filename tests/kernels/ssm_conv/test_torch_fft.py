"""The Fourier path against the dense reference: outputs, every gradient, and exact restarts at documents."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.ssm_conv import kernel_spectrum, ssm_conv
from spade_t5.kernels.ssm_conv.torch_fft import fft_length

F64 = torch.float64


def inputs(batch: int, length: int, d_model: int, num_sides: int = 2, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, d_model, generator=generator, dtype=F64).to(dtype)
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    decay = torch.exp(-torch.arange(length + 3, dtype=F64) / 50)
    ssm_kernel = torch.randn(num_sides, d_model, length + 3, generator=generator, dtype=F64) * decay
    return [u, ssm_kernel.to(parameter_dtype), torch.randn(d_model, generator=generator, dtype=parameter_dtype)]


def upstream_like(u: Tensor) -> Tensor:
    return torch.randn(u.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(u.dtype)


def packed_rows(batch: int, length: int) -> Tensor:
    """Unaligned documents of very different lengths, one of a single token, padding in front, inside and behind."""
    segment_ids = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        middle = length // 3 + row
        segment_ids[row, length // 9 : middle] = 1
        segment_ids[row, middle : middle + 1] = 2
        segment_ids[row, middle + 1 : length - length // 5] = 3
        segment_ids[row, length // 2 : length // 2 + 2] = 0
    return segment_ids


def output_and_gradients(tensors: list[Tensor], segment_ids: Tensor | None, backend: str = "torch") -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = ssm_conv(*leaves, segment_ids=segment_ids, backend=backend)
    y.backward(upstream_like(y))
    return [y.detach(), *(x.grad for x in leaves)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, e in zip(("y", "du", "dkernel", "dskip"), actual, expected, strict=False):
        error = (a.double() - e.double()).abs().max()
        assert error <= tolerance * e.double().abs().max().clamp(min=1.0), (name, error.item())


@pytest.mark.parametrize("length", [1, 63, 500])
@pytest.mark.parametrize("num_sides", [1, 2])
@pytest.mark.parametrize("is_packed", [False, True])
def test_equals_reference_in_float64(length: int, num_sides: int, is_packed: bool) -> None:
    tensors = inputs(2, length, 3, num_sides)
    segment_ids = packed_rows(2, length) if is_packed else None
    expected = output_and_gradients(tensors, segment_ids, "naive")
    assert_all_close(output_and_gradients(tensors, segment_ids), expected, 1e-12)


# Relative to each tensor's largest entry; transforms are in float32, bfloat16 and float16 round inputs and results.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(2, 300, 4, dtype=dtype)
    segment_ids = packed_rows(2, 300)
    exact = [x.double().requires_grad_() for x in tensors]
    y = ssm_conv(*exact, segment_ids=segment_ids, backend="naive")
    y.backward(upstream_like(tensors[0]).double())
    actual = output_and_gradients(tensors, segment_ids)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, torch.float32]
    assert_all_close(actual, [y.detach(), *(x.grad for x in exact)], tolerance)


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(2, 9, 2)]
    segment_ids = torch.tensor([[0, 1, 1, 1, 2, 3, 3, 3, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *x: ssm_conv(*x), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: ssm_conv(*x, segment_ids=segment_ids), tensors, fast_mode=True)


def test_packed_row_equals_separate_documents() -> None:
    lengths, starts = [37, 1, 150, 2], [2, 39, 41, 191]
    segment_ids = torch.tensor([[0, 0] + [1] * 37 + [2, 0] + [3] * 150 + [4, 4] + [0] * 3])
    tensors = inputs(1, segment_ids.shape[1], 3)
    u, ssm_kernel, skip = tensors
    packed = output_and_gradients(tensors, segment_ids)
    upstream = upstream_like(u)
    dkernel, dskip = torch.zeros_like(ssm_kernel), torch.zeros_like(skip)
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        leaves = [
            u[:, part].clone().requires_grad_(),
            ssm_kernel.clone().requires_grad_(),
            skip.clone().requires_grad_(),
        ]
        y = ssm_conv(*leaves)
        y.backward(upstream[:, part])
        assert_all_close([packed[0][:, part], packed[1][:, part]], [y.detach(), leaves[0].grad], 1e-12)
        dkernel += leaves[1].grad
        dskip += leaves[2].grad
    assert_all_close(packed[2:], [dkernel, dskip], 1e-12)
    is_padding = segment_ids[0] == 0
    assert (packed[0][0, is_padding] == 0).all()
    assert (packed[1][0, is_padding] == 0).all()


def test_nothing_leaks_between_documents() -> None:
    """Bit for bit: what one document holds does not reach its neighbours, not even as rounding."""
    u, ssm_kernel, skip = inputs(1, 100, 3, dtype=torch.float32)
    segment_ids = torch.tensor([[1] * 40 + [2] * 25 + [3] * 35])
    changed = u.clone()
    changed[:, 40:65] = 1e6
    y, z = (ssm_conv(x, ssm_kernel, skip, segment_ids=segment_ids) for x in (u, changed))
    assert torch.equal(y[:, :40], z[:, :40])
    assert torch.equal(y[:, 65:], z[:, 65:])


def test_content_of_padding_does_not_matter() -> None:
    u, ssm_kernel, skip = inputs(1, 60, 3)
    segment_ids = torch.tensor([[0] * 5 + [1] * 20 + [0] * 5 + [2] * 20 + [0] * 10])
    changed = torch.where((segment_ids == 0)[:, :, None], torch.nan, u)
    y, z = (ssm_conv(x, ssm_kernel, skip, segment_ids=segment_ids) for x in (u, changed))
    assert torch.equal(y, z)


def test_row_of_padding_only_is_zero() -> None:
    tensors = inputs(2, 20, 3)
    results = output_and_gradients(tensors, torch.zeros(2, 20, dtype=torch.int64))
    assert all((x == 0).all() for x in results)


def test_cached_transform_changes_nothing() -> None:
    u, ssm_kernel, skip = inputs(2, 50, 3, dtype=torch.float32)
    spectrum = kernel_spectrum(ssm_kernel, skip, 50)
    results = []
    for ssm_kernel_f in (None, spectrum):
        leaf = u.clone().requires_grad_()
        y = ssm_conv(leaf, ssm_kernel, skip, ssm_kernel_f=ssm_kernel_f)
        y.backward(upstream_like(u))
        results.append((y.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_runs_are_bitwise_equal() -> None:
    tensors = inputs(2, 300, 3, dtype=torch.float32)
    first, second = (output_and_gradients(tensors, packed_rows(2, 300)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_accepts_non_contiguous_input() -> None:
    u, ssm_kernel, skip = inputs(2, 50, 3)
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    segment_ids = packed_rows(2, 50)
    assert torch.equal(ssm_conv(u, ssm_kernel, skip), ssm_conv(strided, ssm_kernel, skip))
    packed, packed_strided = (ssm_conv(x, ssm_kernel, skip, segment_ids=segment_ids) for x in (u, strided))
    assert torch.equal(packed, packed_strided)


def test_autocast_does_not_reach_inside() -> None:
    tensors = inputs(1, 64, 3, dtype=torch.float32)
    expected = output_and_gradients(tensors, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = output_and_gradients(tensors, None)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_fft_length_is_the_smallest_fast_size() -> None:
    def is_fast(n: int) -> bool:
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    for length in range(1, 400):
        assert fft_length(length) == next(n for n in range(2 * length, 5 * length) if n % 2 == 0 and is_fast(n))

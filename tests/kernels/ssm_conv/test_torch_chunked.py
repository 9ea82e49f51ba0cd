"""The chunked convolution in plain PyTorch against the dense reference, in float64."""

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.ssm_conv import ChunkedSystem, chunked_system, impulse_response, ssm_conv, ssm_conv_chunked

F64 = torch.float64
D_MODEL, NUM_STATES = 3, 4


def system_of(tokens: int, num_sides: int, is_dense: bool) -> tuple[ChunkedSystem, Tensor]:
    """A stable system and its impulse response by single steps, skip in lag 0."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64)

    if is_dense:
        step = torch.linalg.qr(randn(D_MODEL, NUM_STATES, NUM_STATES)).Q * 0.9
    else:
        re, im = (torch.diag_embed(0.6 * torch.tanh(randn(D_MODEL, NUM_STATES // 2))) for _ in range(2))
        step = torch.cat((torch.cat((re, -im), 2), torch.cat((im, re), 2)), 1)
    powers_DXNN = torch.stack([torch.linalg.matrix_power(step, i) for i in range(200)], dim=1)
    b_DN, c_SDN, skip_D = randn(D_MODEL, NUM_STATES), randn(num_sides, D_MODEL, NUM_STATES), randn(D_MODEL)
    inputs_DNT = torch.einsum("dxnm,dm->dnx", powers_DXNN[:, :tokens], b_DN)
    outputs_SDXN = torch.einsum("sdn,dxnm->sdxm", c_SDN, powers_DXNN[:, : tokens + 1])
    transition = powers_DXNN[:, tokens]
    if not is_dense:
        half = NUM_STATES // 2
        columns = transition[:, :, :half]
        transition = torch.cat(
            (columns[:, :half].diagonal(dim1=1, dim2=2), columns[:, half:].diagonal(dim1=1, dim2=2)), 1
        )
    kernel_SDL = torch.einsum("sdn,dxnm,dm->sdx", c_SDN, powers_DXNN, b_DN)
    kernel_SDL[0, :, 0] += skip_D
    return chunked_system(inputs_DNT, outputs_SDXN, transition, skip_D), kernel_SDL


def packed_rows(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(3, length, generator=generator) < torch.tensor([[0.02], [0.2], [0.9]])).cumsum(1) + 1
    return ids.masked_fill_(torch.rand(3, length, generator=generator) < 0.2, 0)


@pytest.mark.parametrize("num_sides", [1, 2])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("length", [1, 16, 63])
def test_equals_the_dense_reference(length: int, tokens: int, is_dense: bool, num_sides: int) -> None:
    system, kernel_SDL = system_of(tokens, num_sides, is_dense)
    torch.testing.assert_close(impulse_response(system, length), kernel_SDL[:, :, :length])
    u = torch.randn(3, length, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=F64)
    upstream = torch.randn(u.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    for segment_ids in (None, packed_rows(length)):
        results = []
        for backend in ("torch", "naive", "reference"):
            leaf = u.clone().requires_grad_()
            if backend == "reference":
                y = ssm_conv(
                    leaf, kernel_SDL, torch.zeros(D_MODEL, dtype=F64), segment_ids=segment_ids, backend="naive"
                )
            else:
                y = ssm_conv_chunked(leaf, system, segment_ids=segment_ids, backend=backend)
            y.backward(upstream)
            results.append((y.detach(), leaf.grad))
        for actual in results[:2]:
            for a, e in zip(actual, results[2], strict=True):
                torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_dense", [True, False])
def test_gradcheck(is_dense: bool) -> None:
    system, _ = system_of(4, 2, is_dense)
    u = torch.randn(3, 14, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=F64)
    leaves = [x.detach().requires_grad_() for x in (u, *system)]
    for segment_ids in (None, packed_rows(14)):
        assert torch.autograd.gradcheck(
            lambda u, *system, ids=segment_ids: ssm_conv_chunked(u, ChunkedSystem(*system), segment_ids=ids),
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, bound: float) -> None:
    system, _ = system_of(16, 2, True)
    u = torch.randn(2, 63, D_MODEL, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = ssm_conv_chunked(u, ChunkedSystem(*(x.float() for x in system)))
    exact = ssm_conv_chunked(u.double(), system)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= bound * exact.norm()


def test_gradients_of_the_matrix_within_chunks_reach_the_lags() -> None:
    """The windows over the lags share their memory: every entry of a diagonal adds to its lag."""
    tokens = 5
    inputs_DNT = torch.zeros(1, 1, tokens, dtype=F64)
    inputs_DNT[..., 0] = 1.0
    outputs_SDXN = torch.randn(
        2, 1, tokens + 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    skip_D = torch.zeros(1, dtype=F64, requires_grad=True)
    local = chunked_system(inputs_DNT, outputs_SDXN, torch.zeros(1, 1, 1, dtype=F64), skip_D).local
    weights = torch.randn(tokens, tokens, dtype=F64, generator=torch.Generator().manual_seed(1))
    (local[0] * weights).sum().backward()
    expected_0 = torch.stack([weights.diagonal(-lag).sum() for lag in range(tokens)])
    expected_1 = torch.stack([weights.diagonal(lag + 1).sum() for lag in range(tokens - 1)])
    assert outputs_SDXN.grad is not None
    torch.testing.assert_close(outputs_SDXN.grad[0, 0, :-1, 0], expected_0)
    torch.testing.assert_close(outputs_SDXN.grad[1, 0, :-2, 0], expected_1)
    torch.testing.assert_close(skip_D.grad, expected_0[:1])

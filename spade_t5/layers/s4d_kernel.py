"""Convolution kernel of S4D: a diagonal state-space model with zero-order hold (arXiv 2206.11893).

Letters as in `s4_kernel`: S sides, D channels, N d_state, M = N / 2 conjugate pairs, L lags; complex numbers are real
tensors (..., 2).
"""

import math

import torch
from torch import Tensor

from spade_t5.layers.s4_kernel import state_scale
from spade_t5.ops import ChunkedSystem, chunked_system


def s4d_lin(d_state: int) -> Tensor:
    """Eigenvalues of S4D-Lin, lambda_n = -1/2 + i pi n, n = 0 .. N/2 - 1: complex128 (N / 2,) on the CPU."""
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


def s4d_kernel(log_dt_D: Tensor, A_DM2: Tensor, C_SDM2: Tensor, length: int) -> Tensor:
    """K_s[j] = 2 Re sum_n c_sn (exp(dt lambda_n) - 1) / lambda_n exp(j dt lambda_n),  j = 0 .. length - 1.

    The powers are a Vandermonde matrix of M x L entries for each channel. It is never built: with j = a T + b and T
    about sqrt(length), exp(j x) = exp(a T x) exp(b x), so M (L/T + T) exponentials and one real matrix product give the
    same numbers.

    Args:
        log_dt_D: logarithm of the step, in tokens.
        A_DM2: [..., 0] = log(-Re lambda), [..., 1] = Im lambda.
        C_SDM2: c, one vector for each side; the input vector B is absorbed in it.
        length: number of lags.

    Returns:
        float64 (S, D, length), differentiable in every tensor.
    """
    step_DM, input_DM, output_SDM = _discretise(log_dt_D, A_DM2, C_SDM2)
    weight_SDM = output_SDM * input_DM

    num_columns = math.isqrt(length - 1) + 1
    num_rows = -(-length // num_columns)
    a = torch.arange(num_rows, dtype=torch.float64, device=step_DM.device) * num_columns
    b = torch.arange(num_columns, dtype=torch.float64, device=step_DM.device)
    rows_SDaM = weight_SDM[:, :, None, :] * torch.exp(a[:, None] * step_DM[:, None, :])
    columns_DMb = torch.exp(step_DM[:, :, None] * b)
    rows_SDaN = 2.0 * torch.cat((rows_SDaM.real, -rows_SDaM.imag), dim=-1)
    columns_DNb = torch.cat((columns_DMb.real, columns_DMb.imag), dim=1)
    return (rows_SDaN @ columns_DNb).flatten(2)[:, :, :length]


def s4d_system(log_dt_D: Tensor, A_DM2: Tensor, C_SDM2: Tensor, skip_D: Tensor, chunk_tokens: int) -> ChunkedSystem:
    """The same system in chunks, its powers from exponentials in float64.

    Args:
        log_dt_D: as of `s4d_kernel`, like the next two.
        A_DM2: see there.
        C_SDM2: see there.
        skip_D: weight of the token itself; its dtype is that of the result.
        chunk_tokens: T.

    Returns:
        diagonal system, differentiable in every tensor.
    """
    step_DM, input_DM, output_SDM = _discretise(log_dt_D, A_DM2, C_SDM2)
    scale_D1 = state_scale(log_dt_D)[:, None]
    lags = torch.arange(chunk_tokens + 1, dtype=torch.float64, device=step_DM.device)
    power_DMX = torch.exp(step_DM[:, :, None] * lags)
    columns_DMT = (input_DM / scale_D1)[:, :, None] * power_DMX[:, :, :-1]
    rows_SDXM = (output_SDM * scale_D1)[:, :, None, :] * power_DMX.transpose(1, 2)
    return chunked_system(
        torch.cat((columns_DMT.real, columns_DMT.imag), dim=1),
        2.0 * torch.cat((rows_SDXM.real, -rows_SDXM.imag), dim=-1),
        torch.cat((power_DMX[:, :, -1].real, power_DMX[:, :, -1].imag), dim=1),
        skip_D,
    )


def _discretise(log_dt_D: Tensor, A_DM2: Tensor, C_SDM2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dt lambda (D, M), (exp(dt lambda) - 1) / lambda (D, M) and c (S, D, M), complex128."""
    A_DM = torch.complex(-A_DM2[..., 0].double().exp(), A_DM2[..., 1].double())
    step_DM = log_dt_D.double().exp()[:, None] * A_DM
    return step_DM, torch.expm1(step_DM) / A_DM, torch.view_as_complex(C_SDM2.double())

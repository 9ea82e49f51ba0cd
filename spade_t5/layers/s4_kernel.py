"""Convolution kernel of S4: HiPPO-LegS with a low-rank correction, discretised by the bilinear rule (arXiv 2111.00396).

The kernel is built at the length that is asked for, from dense powers of the real N x N transition, in float64. Neither
the Cauchy form of the paper nor a diagonalisation is used: dense powers need no bound on the length and no special
functions, and they are stable, because A + A' is negative definite, so that the transition is a contraction and all its
powers are bounded. (The eigenvectors of LegS itself have condition 1e20 at N = 64.)

Letters: S sides (1 causal, 2 two-sided), D channels, N d_state, M = N / 2 conjugate pairs, of which one member is
    stored, L lags.
Complex numbers are stored as real tensors (..., 2), real part first.
"""

import numpy as np
import torch
from torch import Tensor

from spade_t5.ops import ChunkedSystem, chunked_system

_MIN_DECAY = 1e-3


def legs_dplr(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in the basis where its normal part is diagonal.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k;  B_n = sqrt(2n+1);  P_n = sqrt(n + 1/2);
    A = V (diag(lambda) - p p*) V*,  p = V* P,  b = V* B,  Re lambda = -1/2

    Of every conjugate pair the member with Im lambda < 0 is kept, the fastest first. An eigenvector is free up to a
    phase, which is fixed by making p real and positive: the same numbers on every machine.

    Args:
        d_state: N, even.

    Returns:
        lambda, p, b: complex128 tensors (N / 2,) on the CPU.
    """
    n = np.arange(d_state)
    root = np.sqrt(2.0 * n + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    P = np.sqrt(n + 0.5)
    skew = A + np.outer(P, P) + 0.5 * np.eye(d_state)
    imaginary, V = np.linalg.eigh(-1j * skew)
    imaginary, V = imaginary[: d_state // 2], V[:, : d_state // 2]
    p, b = V.conj().T @ P, V.conj().T @ root
    phase = p / np.abs(p)
    return torch.from_numpy(-0.5 + 1j * imaginary), torch.from_numpy(p / phase), torch.from_numpy(b / phase)


def s4_kernel(log_dt_D: Tensor, A_DM2: Tensor, P_DM2: Tensor, B_DM2: Tensor, C_SDM2: Tensor, length: int) -> Tensor:
    """K_s[j] = 2 Re(c_s z_j),  z_j = Abar^j Bbar,  for j = 0 .. length - 1.

    z' = lambda z - p 2 Re(p* z) + b u is taken to real coordinates x = [Re z; Im z], x' = A x + B u, and discretised:
    Abar = (I - dt/2 A)^-1 (I + dt/2 A),  Bbar = (I - dt/2 A)^-1 dt B.

    Args:
        log_dt_D: logarithm of the step, in tokens.
        A_DM2: [..., 0] = log(-Re lambda), [..., 1] = Im lambda.
        P_DM2: p.
        B_DM2: b.
        C_SDM2: c, one vector for each side.
        length: number of lags.

    Returns:
        float64 (S, D, length), differentiable in every tensor.
    """
    transition_DNN, input_DN, output_SDN = _discretise(log_dt_D, A_DM2, P_DM2, B_DM2, C_SDM2)
    return kernel_by_doubling(transition_DNN, input_DN, output_SDN, length)


def s4_system(
    log_dt_D: Tensor, A_DM2: Tensor, P_DM2: Tensor, B_DM2: Tensor, C_SDM2: Tensor, skip_D: Tensor, chunk_tokens: int
) -> ChunkedSystem:
    """The same system in chunks; its powers are made by doubling, in float64.

    Args:
        log_dt_D: as of `s4_kernel`, like the next four.
        A_DM2: see there.
        P_DM2: see there.
        B_DM2: see there.
        C_SDM2: see there.
        skip_D: weight of the token itself; its dtype is that of the result.
        chunk_tokens: T, a power of two.

    Returns:
        dense system, differentiable in every tensor.
    """
    power_DNN, input_DN, output_SDN = _discretise(log_dt_D, A_DM2, P_DM2, B_DM2, C_SDM2)
    scale_D11 = state_scale(log_dt_D)[:, None, None]
    columns_DNT = input_DN[:, :, None] / scale_D11
    rows_SDTN = output_SDN[:, :, None, :] * scale_D11
    while columns_DNT.shape[2] < chunk_tokens:
        columns_DNT = torch.cat((columns_DNT, power_DNN @ columns_DNT), dim=2)
        rows_SDTN = torch.cat((rows_SDTN, rows_SDTN @ power_DNN), dim=2)
        power_DNN = power_DNN @ power_DNN
    rows_SDXN = torch.cat((rows_SDTN, rows_SDTN[:, :, :1] @ power_DNN), dim=2)
    return chunked_system(columns_DNT, rows_SDXN, power_DNN, skip_D)


def state_scale(log_dt_D: Tensor) -> Tensor:
    """Unit in which states are counted: sqrt(dt) makes what enters them and what leaves them equally large.

    A state sums about 1/dt tokens, each with weight dt; outputs, and states of the backward pass, are scaled the other
    way round. The product does not change, so no gradient is needed; half precision is left the widest margin.
    """
    return (0.5 * log_dt_D.detach().double()).exp()


def _discretise(
    log_dt_D: Tensor, A_DM2: Tensor, P_DM2: Tensor, B_DM2: Tensor, C_SDM2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Abar (D, N, N), Bbar (D, N) and the output vectors (S, D, N) in real coordinates, float64."""
    log_dt_D, A_DM2, P_DM2, B_DM2, C_SDM2 = (x.double() for x in (log_dt_D, A_DM2, P_DM2, B_DM2, C_SDM2))
    decay_DM, frequency_DM = (
        torch.diag_embed(A_DM2[..., 0].exp().clamp(min=_MIN_DECAY)),
        torch.diag_embed(A_DM2[..., 1]),
    )
    p_DN, b_DN = (x.transpose(1, 2).flatten(1) for x in (P_DM2, B_DM2))
    c_SDN = 2.0 * torch.cat((C_SDM2[..., 0], -C_SDM2[..., 1]), dim=-1)
    diagonal_DNN = torch.cat(
        (torch.cat((-decay_DM, -frequency_DM), dim=2), torch.cat((frequency_DM, -decay_DM), dim=2)), dim=1
    )
    A_DNN = diagonal_DNN - 2.0 * p_DN[:, :, None] * p_DN[:, None, :]

    dt_D11 = log_dt_D.exp()[:, None, None]
    identity = torch.eye(A_DNN.shape[1], dtype=A_DNN.dtype, device=A_DNN.device)
    half_DNN = 0.5 * dt_D11 * A_DNN
    right_DNX = torch.cat((identity + half_DNN, dt_D11 * b_DN[:, :, None]), dim=2)
    # never singular, as A + A' is negative definite; `solve` itself would make the host wait for a GPU's error codes
    solved_DNX = torch.linalg.solve_ex(identity - half_DNN, right_DNX, check_errors=False).result
    return solved_DNX[:, :, :-1], solved_DNX[:, :, -1], c_SDN


def kernel_by_doubling(transition_DNN: Tensor, input_DN: Tensor, output_SDN: Tensor, length: int) -> Tensor:
    """K_s[j] = output_s transition^j input for j = 0 .. length - 1, from about log2(length) matrix powers.

    K[a T + b] = (output transition^{aT}) (transition^b input), T about sqrt(length): both factors grow by doubling, so
    that time is O(N^3 log L + N^2 sqrt(L) + N L) and memory O(N^2 + N sqrt(L) + L) for each channel.

    Args:
        transition_DNN: a contraction.
        input_DN: column vectors.
        output_SDN: row vectors, one for each side.
        length: number of lags.

    Returns:
        (S, D, length).
    """
    columns_DNT = input_DN[:, :, None]
    power_DNN = transition_DNN
    while columns_DNT.shape[2] ** 2 < length:
        columns_DNT = torch.cat((columns_DNT, power_DNN @ columns_DNT), dim=2)
        power_DNN = power_DNN @ power_DNN
    num_columns = columns_DNT.shape[2]
    num_rows = -(-length // num_columns)

    rows_DRN = output_SDN.movedim(0, 1)
    num_sides = rows_DRN.shape[1]
    while rows_DRN.shape[1] < num_sides * num_rows:
        rows_DRN = torch.cat((rows_DRN, rows_DRN @ power_DNN), dim=1)
        power_DNN = power_DNN @ power_DNN
    blocks_DRT = rows_DRN[:, : num_sides * num_rows] @ columns_DNT
    blocks_DaST = blocks_DRT.unflatten(1, (num_rows, num_sides))
    return blocks_DaST.permute(2, 0, 1, 3).flatten(2)[:, :, :length]

"""The convolution with a chunked system by its impulse response: the reference that knows no chunks."""

import torch
from torch import Tensor

from spade_t5.kernels.ssm_conv.naive import ssm_conv_naive
from spade_t5.kernels.ssm_conv.system import ChunkedSystem


def ssm_conv_chunked_naive(u_BLD: Tensor, system: ChunkedSystem, segment_ids: Tensor | None = None) -> Tensor:
    """Arguments and result as of `ssm_conv_chunked`, unchecked; the local matrices must be those of the system."""
    kernel_SDL = impulse_response(system, u_BLD.shape[1])
    return ssm_conv_naive(u_BLD, kernel_SDL, torch.zeros_like(kernel_SDL[0, :, 0]), segment_ids)


def impulse_response(system: ChunkedSystem, length: int) -> Tensor:
    """First lags of the kernel, in float32 at least; the skip is in lag 0.

    k0[m T + i + 1] = P0[i] A_T^m B,   k1[m T + T-1-i] = P1[i] A_T^m B,   B the last column of W0 and the first of W1;
    k0[0] = M_00.

    Args:
        system: of T tokens a chunk.
        length: number of lags.

    Returns:
        (S, D, length).
    """
    local, w, p, transition = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in system)
    chunks = -(-length // system.chunk_tokens)
    num_states = system.num_states
    sides = []
    for i_side in range(system.num_sides):
        states = slice(i_side * num_states, (i_side + 1) * num_states)
        s_DN = w[:, states, -1 if i_side == 0 else 0]
        p_DTN = p[:, :, states] if i_side == 0 else p[:, :, states].flip(1)
        blocks = []
        for _ in range(chunks):
            blocks.append(torch.einsum("dtn,dn->dt", p_DTN, s_DN))
            s_DN = torch.einsum("dnm,dm->dn", as_matrices(transition), s_DN)
        kernel_DL = torch.cat(blocks, dim=1)
        sides.append(torch.cat((local[:, :1, 0], kernel_DL), dim=1) if i_side == 0 else kernel_DL)
    return torch.stack([kernel_DL[:, :length] for kernel_DL in sides])


def as_matrices(transition: Tensor) -> Tensor:
    """A dense transition (D, N, N) as it is, a diagonal one (D, N) as the matrix that acts on [Re; Im]."""
    if transition.dim() == 3:
        return transition
    re, im = (torch.diag_embed(x) for x in transition.chunk(2, dim=-1))
    return torch.cat((torch.cat((re, -im), dim=2), torch.cat((im, re), dim=2)), dim=1)

"""The chunked convolution in plain PyTorch: the readable twin of the Triton kernels, with autograd's gradients.

Serves where a system is given in chunks and Triton is not at hand; from an impulse response, `ssm_conv` by Fourier
transform is the faster way on a CPU. Shapes: B rows, D channels, C chunks of T tokens, S sides, N states a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_t5.kernels.ssm_conv.chunk_documents import ChunkDocuments, chunk_documents
from spade_t5.kernels.ssm_conv.system import ChunkedSystem


def ssm_conv_chunked_torch(u_BLD: Tensor, system: ChunkedSystem, segment_ids: Tensor | None = None) -> Tensor:
    """Y = M U + P s within each document; arguments and result as of `ssm_conv_chunked`, unchecked."""
    length = u_BLD.shape[1]
    dtype = torch.promote_types(u_BLD.dtype, torch.float32)
    documents = chunk_documents(
        torch.ones_like(u_BLD[:, :, 0], dtype=torch.int64) if segment_ids is None else segment_ids, system.chunk_tokens
    )
    with torch.autocast(u_BLD.device.type, enabled=False):
        u_BCTD = F.pad(u_BLD.to(dtype), (0, 0, 0, -length % system.chunk_tokens))
        u_BDCT = u_BCTD.unflatten(1, (-1, system.chunk_tokens)).permute(0, 3, 1, 2)
        y_BDCT = _convolve(u_BDCT, ChunkedSystem(*(x.to(dtype) for x in system)), documents)
    return y_BDCT.permute(0, 2, 3, 1).flatten(1, 2)[:, :length].to(u_BLD.dtype)


def _convolve(u_BDCT: Tensor, system: ChunkedSystem, documents: ChunkDocuments) -> Tensor:
    piece = documents.piece[:, None]
    last_piece = documents.num_pieces[:, None, :, None] - 1
    y_BDCT = torch.zeros_like(u_BDCT)
    # The largest number of pieces is what the Triton kernels read for each tile on the device.
    for i_piece in range(int(documents.num_pieces.max())):
        is_inside = piece == i_piece
        y_BDCT = y_BDCT + _masked(_per_channel(system.local, _masked(u_BDCT, is_inside)), is_inside)

    sides = zip(system.w.split(system.num_states, dim=1), system.p.split(system.num_states, dim=2), strict=True)
    for is_mirrored, (w_DNT, p_DTN) in zip((False, True), sides, strict=False):
        # Behind a chunk lies its last document, before it its first.
        is_sent, is_reached = piece == last_piece, piece == 0
        if is_mirrored:
            is_sent, is_reached = is_reached, is_sent
        added_BDCN = _per_channel(w_DNT, _masked(u_BDCT, is_sent))
        s_BDCN = _states_that_arrive(added_BDCN, system, documents, is_mirrored=is_mirrored)
        y_BDCT = y_BDCT + _masked(_per_channel(p_DTN, s_BDCN), is_reached)
    return y_BDCT


def _states_that_arrive(
    added_BDCN: Tensor, system: ChunkedSystem, documents: ChunkDocuments, *, is_mirrored: bool
) -> Tensor:
    """States at the start of each chunk, or, mirrored, at its end, from what every chunk adds."""
    num_chunks = added_BDCN.shape[2]
    is_one_piece_BC, is_linked_BC = documents.num_pieces == 1, documents.is_linked == 1
    order = range(num_chunks - 1, -1, -1) if is_mirrored else range(num_chunks)
    s_BDN = torch.zeros_like(added_BDCN[:, :, 0])
    arriving: list[Tensor] = []
    for c in order:
        # The edge between this chunk and the one the states come from; none precedes the first or follows the last.
        edge = c + 1 if is_mirrored else c
        if 0 < edge < num_chunks:
            s_BDN = _masked(s_BDN, is_linked_BC[:, edge, None, None])
        arriving.append(s_BDN)
        s_BDN = _masked(_advance(s_BDN, system), is_one_piece_BC[:, c, None, None]) + added_BDCN[:, :, c]
    return torch.stack(arriving[::-1] if is_mirrored else arriving, dim=2)


def _advance(s_BDN: Tensor, system: ChunkedSystem) -> Tensor:
    """States one chunk further on."""
    if system.is_dense:
        return torch.einsum("dnm,bdm->bdn", system.transition, s_BDN)
    (a_re, a_im), (s_re, s_im) = system.transition.chunk(2, dim=-1), s_BDN.chunk(2, dim=-1)
    return torch.cat((a_re * s_re - a_im * s_im, a_re * s_im + a_im * s_re), dim=-1)


def _per_channel(matrix_DXY: Tensor, x_BDCY: Tensor) -> Tensor:
    return x_BDCY @ matrix_DXY.transpose(1, 2)


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    """Zero where not kept, whatever stands there: a product with zero would let NaN through."""
    return torch.where(keep, x, 0.0)

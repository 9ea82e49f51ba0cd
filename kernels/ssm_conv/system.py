"""A linear state-space system cut into chunks of T tokens: the form in which the convolution is a few matrix products.

Of one channel, with u the tokens of a chunk and s the states that reach it:

    states it adds     W u             W = [A^{T-1-j} B | A^j B]
    states passed on   A_T s + W u     A_T = A^T, after the last token of a chunk, or, mirrored, before its first
    output             M u + P s       M_ij = k0[i-j] for i >= j, k1[j-i-1] for i < j;  P = [C0 A^{i+1} | C1 A^{T-1-i}]

Letters: D channels, T tokens of a chunk, S sides (1 causal, 2 two-sided), N real states a side, R = S N.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkedSystem(NamedTuple):
    """The four matrices of every channel; float32, or float64 for the backends without Triton.

    Where nothing of the system trains, the first three may be float16: what the Triton kernels multiply when the input
    is in half precision, cast once instead of in every call.
    """

    local: Tensor
    """M (D, T, T): within a chunk; the skip is on the diagonal."""
    w: Tensor
    """W (D, R, T): from a chunk to the states behind it, and before it."""
    p: Tensor
    """P (D, T, R): from the states that reach a chunk to its outputs."""
    transition: Tensor
    """A_T: dense (D, N, N); or diagonal (D, N), complex numbers [Re; Im] that act on states [Re; Im]."""

    @property
    def chunk_tokens(self) -> int:
        """T."""
        return self.local.shape[1]

    @property
    def num_states(self) -> int:
        """N, of one side."""
        return self.transition.shape[1]

    @property
    def num_sides(self) -> int:
        """S."""
        return self.w.shape[1] // self.num_states

    @property
    def is_dense(self) -> bool:
        """Whether the transition is a matrix."""
        return self.transition.dim() == 3

    @property
    def transition_class(self) -> str:
        """Name of the kind of transition: "dense" or "diagonal"."""
        return "dense" if self.is_dense else "diagonal"

    def half(self) -> "ChunkedSystem":
        """The frozen system with `local`, `w` and `p` in float16."""
        local, w, p = (x.detach().to(torch.float16) for x in (self.local, self.w, self.p))
        return ChunkedSystem(local, w, p, self.transition.detach())


def chunked_system(inputs_DNT: Tensor, outputs_SDXN: Tensor, transition: Tensor, skip_D: Tensor) -> ChunkedSystem:
    """Assemble a system from the powers of its transition, differentiable in every argument.

    Args:
        inputs_DNT: A^j B for j = 0 .. T-1.
        outputs_SDXN: C_s A^i for i = 0 .. T, so that X = T + 1.
        transition: A^T, as in `ChunkedSystem`.
        skip_D: its dtype is that of the result.
    """
    dtype = skip_D.dtype
    w_sides = [inputs_DNT.flip(2), inputs_DNT]
    p_sides = [outputs_SDXN[0, :, 1:]]
    num_sides = len(outputs_SDXN)
    if num_sides == 2:
        p_sides.append(outputs_SDXN[1, :, :-1].flip(1))
    lags_SDT = (outputs_SDXN[:, :, :-1] @ inputs_DNT[:, :, :1])[..., 0].to(dtype)
    causal_DT = torch.cat((lags_SDT[0, :, :1] + skip_D[:, None], lags_SDT[0, :, 1:]), dim=1)
    mirrored_DX = lags_SDT[1, :, :-1] if num_sides == 2 else torch.zeros_like(causal_DT[:, 1:])
    return ChunkedSystem(
        _toeplitz(torch.cat((causal_DT.flip(1), mirrored_DX), dim=1)),
        torch.cat(w_sides[:num_sides], dim=1).to(dtype),
        torch.cat(p_sides, dim=2).to(dtype),
        transition.to(dtype),
    )


def _toeplitz(lags_DX: Tensor) -> Tensor:
    """M_ij = lags[T-1 - i + j] from the X = 2T - 1 lags; windows, not an index: their gradient is summed without atomics."""
    return lags_DX.unfold(1, (lags_DX.shape[1] + 1) // 2, 1).flip(1)

"""The SSM convolution as a dense matrix per channel: the reference for every other backend.

Memory grows with the square of the length. Shapes: B batch, L length, D d_model, S sides of the kernel (1 causal, 2
two-sided).
"""

import torch
from torch import Tensor


def ssm_conv_naive(u_BLD: Tensor, ssm_kernel_SDL: Tensor, skip_D: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """y_t = sum_s K[t - s] u_s + skip u_t over the tokens s of t's document; arguments as of `ssm_conv`, unchecked."""
    length = u_BLD.shape[1]
    dtype = torch.promote_types(u_BLD.dtype, torch.float32)
    positions = torch.arange(length, device=u_BLD.device)
    lags_LL = positions[:, None] - positions[None, :]
    after = ssm_kernel_SDL[0][:, lags_LL.clamp(min=0)]
    before = ssm_kernel_SDL[1][:, (-lags_LL - 1).clamp(min=0)] if len(ssm_kernel_SDL) == 2 else torch.zeros_like(after)
    matrix_DLL = torch.where(lags_LL >= 0, after, before).to(dtype)
    if segment_ids is None:
        segment_ids = torch.ones_like(u_BLD[:, :, 0], dtype=torch.int64)
    is_same_document_BLL = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)

    with torch.autocast(u_BLD.device.type, enabled=False):
        u = u_BLD.to(dtype)
        y_BLD = torch.einsum("dts,bts,bsd->btd", matrix_DLL, is_same_document_BLL.to(dtype), u) + skip_D.to(dtype) * u
    return y_BLD.masked_fill((segment_ids == 0)[:, :, None], 0.0).to(u_BLD.dtype)

"""The public `ssm_conv`: checks its arguments and hands them to a backend.

Shapes: B batch, L length, D d_model, S sides of the kernel (1 causal, 2 two-sided).
"""

import torch
from torch import Tensor

from spade_t5.kernels.backend import choose_backend
from spade_t5.kernels.segments import check_segment_ids
from spade_t5.kernels.ssm_conv.naive import ssm_conv_naive
from spade_t5.kernels.ssm_conv.torch_fft import fft_length, ssm_conv_fft

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ssm_conv(
    u: Tensor,
    ssm_kernel: Tensor,
    skip: Tensor,
    *,
    segment_ids: Tensor | None = None,
    ssm_kernel_f: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve every channel with its kernel, within each document (S4, arXiv 2111.00396, in its bidirectional form).

    y_t = sum_{j>=0} k0[j] u_{t-j} + sum_{j>=0} k1[j] u_{t+1+j} + skip u_t      k0 = ssm_kernel[0], k1 = ssm_kernel[1]

    Backward: du is the correlation of dy with the same kernel plus skip dy; dk[lag] = sum_t dy_t u_{t-lag};
    dskip = dk[0].

    Args:
        u: input (B, L, D); float32, float64, bfloat16 or float16.
        ssm_kernel: (2, D, L or more) float32 or float64; [0] holds lags 0, 1, ..., [1] holds lags -1, -2, ...; (1, D, L
            or more): causal.
        skip: (D,), same dtype as `ssm_kernel`.
        segment_ids: (B, L) int64, 0 = padding (input taken as 0, output 0), 1, 2, ... = document within the row,
            non-decreasing over the non-zero entries. None: every row is one document.
        ssm_kernel_f: `kernel_spectrum(ssm_kernel, skip, L)`, kept from an earlier call while the kernel is frozen;
            saves a transform where every row is one document.
        backend: "auto", "torch" or "naive"; Triton works from the system, see `ssm_conv_chunked`.

    Returns:
        (B, L, D) in the dtype of `u`.

    Raises:
        ValueError: a shape, dtype or device is wrong, segments are out of order, or the backend is not available.
    """
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected a non-empty (batch, length, d_model)")
    if u.dtype not in _DTYPES:
        raise ValueError(f"u has dtype {u.dtype}; cast it to one of {', '.join(str(dtype) for dtype in _DTYPES)}")
    _, length, d_model = u.shape
    if (
        ssm_kernel.dim() != 3
        or ssm_kernel.shape[0] not in (1, 2)
        or ssm_kernel.shape[1] != d_model
        or ssm_kernel.shape[2] < length
    ):
        raise ValueError(
            f"ssm_kernel has shape {tuple(ssm_kernel.shape)}; expected (1 or 2, {d_model}, at least {length} lags)"
        )
    if skip.shape != (d_model,):
        raise ValueError(f"skip has shape {tuple(skip.shape)}; expected ({d_model},)")
    for name, x in (("ssm_kernel", ssm_kernel), ("skip", skip)):
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} has dtype {x.dtype}; keep SSM tensors in float32, lower precision destroys long memories"
            )
        if x.device != u.device:
            raise ValueError(f"{name} is on {x.device}; move it to {u.device}, where u is")
    if segment_ids is not None:
        check_segment_ids(segment_ids, u)
    if ssm_kernel_f is not None:
        if ssm_kernel.requires_grad or skip.requires_grad:
            raise ValueError(
                "ssm_kernel_f is given although ssm_kernel or skip requires a gradient; leave it out, or detach both"
            )
        expected = (d_model, fft_length(length) // 2 + 1)
        if ssm_kernel_f.shape != expected:
            raise ValueError(
                f"ssm_kernel_f has shape {tuple(ssm_kernel_f.shape)}; expected {expected}: make it with kernel_spectrum"
            )

    if backend == "triton":
        raise ValueError(
            "backend='triton' cannot convolve with an impulse response; use ssm_conv_chunked with the system itself, or"
            " backend 'torch'"
        )
    if backend != "auto" and choose_backend(backend, u.device) == "naive":
        return ssm_conv_naive(u, ssm_kernel, skip, segment_ids)
    return ssm_conv_fft(u, ssm_kernel, skip, segment_ids, ssm_kernel_f)

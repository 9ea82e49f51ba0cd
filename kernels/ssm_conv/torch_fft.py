"""The SSM convolution by fast Fourier transform: the path for CPUs, and for any device without a kernel of its own.

A row that is one document is transformed as it stands. Documents of packed rows are gathered first, wherever they start
and however long they are, those of similar length together (the longest of a group is less than twice the shortest, so
less than half is waste); each is convolved by itself with the first lags of the kernel, so nothing crosses from one to
the next, and written back.

Transforms run in float32 (float64 for float64 input), a few channels at a time, which keeps them in cache and their
memory small. The backward pass is written out because autograd's gradient of a real transform is a complex one of twice
the cost.

Shapes: B batch, L length, D d_model, S sides of the kernel, R documents of a group, M tokens of its longest, F
    frequencies,
C channels of one step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Padded tokens x channels of one step: the transforms of a step then take a few megabytes.
_STEP_ELEMENTS = 1 << 20


def ssm_conv_fft(
    u_BLD: Tensor,
    ssm_kernel_SDL: Tensor,
    skip_D: Tensor,
    segment_ids: Tensor | None = None,
    ssm_kernel_f: Tensor | None = None,
) -> Tensor:
    """Y = K * u + skip u within each document; arguments as of `ssm_conv`, only the order of segments is checked."""
    groups = None if segment_ids is None else _group_documents(segment_ids)
    spectrum_DF = ssm_kernel_f if segment_ids is None else None
    return _Convolution.apply(u_BLD, ssm_kernel_SDL, skip_D, spectrum_DF, groups)


@functools.lru_cache(maxsize=4096)
def fft_length(length: int) -> int:
    """Smallest even 2^a 3^b 5^c that is at least twice `length`: room for lags of both signs, and a fast transform."""
    best = 1 << (2 * length - 1).bit_length()
    power_of_5 = 1
    while power_of_5 < best:
        power_of_15 = power_of_5
        while power_of_15 < best:
            candidate = 2 * power_of_15
            while candidate < 2 * length:
                candidate *= 2
            best = min(best, candidate)
            power_of_15 *= 3
        power_of_5 *= 5
    return best


def kernel_spectrum(ssm_kernel_SDL: Tensor, skip_D: Tensor, length: int) -> Tensor:
    """Transform of the first `length` lags on each side, on a circle of `fft_length(length)`; lag 0 holds the skip too.

    Args:
        ssm_kernel_SDL: (1 or 2, D, `length` or more), as for `ssm_conv`.
        skip_D: (D,), as for `ssm_conv`.
        length: tokens of the longest document it is to serve.

    Returns:
        complex (D, fft_length(length) // 2 + 1).
    """
    num_points = fft_length(length)
    circle = ssm_kernel_SDL.new_zeros(ssm_kernel_SDL.shape[1], num_points)
    circle[:, :length] = ssm_kernel_SDL[0, :, :length]
    circle[:, 0] += skip_D
    if len(ssm_kernel_SDL) == 2:
        circle[:, num_points - length :] = ssm_kernel_SDL[1, :, :length].flip(-1)
    return torch.fft.rfft(circle)


@dataclass(frozen=True)
class _Documents:
    """Documents of similar length, as rows of token positions in the flattened (B L) batch."""

    positions_RM: Tensor
    is_token_RM: Tensor

    def gather(self, x_BLD: Tensor) -> Tensor:
        x_RMD = x_BLD.flatten(0, 1).index_select(0, self.positions_RM.flatten()).unflatten(0, self.positions_RM.shape)
        return x_RMD.masked_fill_(~self.is_token_RM[:, :, None], 0.0)

    def scatter(self, out_BLD: Tensor, x_RMD: Tensor) -> None:
        out_BLD.view(-1, out_BLD.shape[-1])[self.positions_RM[self.is_token_RM]] = x_RMD[self.is_token_RM]


def _group_documents(segment_ids: Tensor) -> tuple[_Documents, ...]:
    """Documents of the batch in groups of similar length, shortest first."""
    flat_ids = segment_ids.flatten()
    tokens = flat_ids.nonzero()[:, 0]
    if len(tokens) == 0:
        return ()
    ids, rows = flat_ids[tokens], tokens // segment_ids.shape[1]
    is_new_row = rows[1:] != rows[:-1]
    if bool(((ids[1:] < ids[:-1]) & ~is_new_row).any()):
        raise ValueError("segment_ids decrease within a row; number the documents of a row in order, 0 for padding")
    is_new_document = is_new_row | (ids[1:] != ids[:-1])
    edge = torch.ones(1, dtype=torch.bool, device=tokens.device)
    starts = tokens[torch.cat((edge, is_new_document))]
    lengths = tokens[torch.cat((is_new_document, edge))] + 1 - starts

    groups = []
    length_classes = torch.frexp(lengths.double()).exponent
    for length_class in length_classes.unique(sorted=True):
        members = length_classes == length_class
        offsets_M = torch.arange(int(lengths[members].max()), device=tokens.device)
        is_inside = offsets_M < lengths[members, None]
        positions = torch.where(is_inside, starts[members, None] + offsets_M, starts[members, None])
        groups.append(_Documents(positions, is_inside & (flat_ids[positions] != 0)))
    return tuple(groups)


class _Convolution(torch.autograd.Function):
    """Without groups, every row is one document and goes as it stands."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BLD: Tensor,
        ssm_kernel_SDL: Tensor,
        skip_D: Tensor,
        spectrum_DF: Tensor | None,
        groups: Sequence[_Documents] | None,
    ) -> Tensor:
        trains_ssm = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(u_BLD if trains_ssm else None, ssm_kernel_SDL, skip_D, spectrum_DF)
        ctx.groups = groups
        with torch.autocast(u_BLD.device.type, enabled=False):
            spectrum = _Spectrum(ssm_kernel_SDL, skip_D, spectrum_DF, u_BLD.dtype)
            convolve = functools.partial(_filter, spectrum=spectrum, correlate=False)
            return convolve(u_BLD) if groups is None else _per_group(u_BLD, groups, convolve)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
        u_BLD, ssm_kernel_SDL, skip_D, spectrum_DF = ctx.saved_tensors
        du_BLD = dkernel_SDL = dskip_D = None
        with torch.autocast(dy_BLD.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                spectrum = _Spectrum(ssm_kernel_SDL, skip_D, spectrum_DF, dy_BLD.dtype)
                correlate = functools.partial(_filter, spectrum=spectrum, correlate=True)
                du_BLD = correlate(dy_BLD) if ctx.groups is None else _per_group(dy_BLD, ctx.groups, correlate)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dkernel_SDL = torch.zeros_like(ssm_kernel_SDL)
                if ctx.groups is None:
                    _add_lag_products(dkernel_SDL, dy_BLD, u_BLD)
                else:
                    for group in ctx.groups:
                        _add_lag_products(dkernel_SDL, group.gather(dy_BLD), group.gather(u_BLD))
                # The skip is a second name for lag 0.
                dskip_D = dkernel_SDL[0, :, 0].clone()
        return du_BLD, dkernel_SDL, dskip_D, None, None


@dataclass(frozen=True)
class _Spectrum:
    """Transform of the kernel for some channels, cached or made when asked for."""

    ssm_kernel_SDL: Tensor
    skip_D: Tensor
    cached_DF: Tensor | None
    signal_dtype: torch.dtype

    def of(self, channels: slice, length: int) -> Tensor:
        if self.cached_DF is not None:
            return self.cached_DF[channels]
        dtype = torch.promote_types(self.signal_dtype, torch.float32)
        return kernel_spectrum(self.ssm_kernel_SDL[:, channels].to(dtype), self.skip_D[channels].to(dtype), length)


def _per_group(x_BLD: Tensor, groups: Sequence[_Documents], convolve: Callable[[Tensor], Tensor]) -> Tensor:
    out_BLD = torch.zeros_like(x_BLD, memory_format=torch.contiguous_format)
    for group in groups:
        group.scatter(out_BLD, convolve(group.gather(x_BLD)))
    return out_BLD


def _filter(x_RMD: Tensor, *, spectrum: _Spectrum, correlate: bool) -> Tensor:
    """Convolve the rows with the kernel, or correlate them with it, which is the transpose."""
    length = x_RMD.shape[1]
    out_RMD = torch.empty_like(x_RMD, memory_format=torch.contiguous_format)
    for channels in _channel_steps(x_RMD):
        k_CF = spectrum.of(channels, length)
        x_RCF = _transform(x_RMD[..., channels]).mul_(k_CF.conj() if correlate else k_CF)
        out_RMD[..., channels] = torch.fft.irfft(x_RCF, n=fft_length(length))[..., :length].transpose(1, 2)
    return out_RMD


def _add_lag_products(dkernel_SDL: Tensor, dy_RMD: Tensor, u_RMD: Tensor) -> None:
    """Dkernel += sum over rows and t of dy_t u_{t - lag}."""
    length = u_RMD.shape[1]
    num_points = fft_length(length)
    for channels in _channel_steps(u_RMD):
        product_RCF = _transform(dy_RMD[..., channels]).mul_(_transform(u_RMD[..., channels]).conj())
        circle = torch.fft.irfft(product_RCF.sum(dim=0), n=num_points)
        dkernel_SDL[0, channels, :length] += circle[:, :length]
        if len(dkernel_SDL) == 2:
            dkernel_SDL[1, channels, :length] += circle[:, num_points - length :].flip(-1)


def _transform(x_RMC: Tensor) -> Tensor:
    """Spectrum over the tokens, (R, C, F), in float32 at least."""
    rows, length, channels = x_RMC.shape
    padded_RCM = x_RMC.new_zeros(
        rows, channels, fft_length(length), dtype=torch.promote_types(x_RMC.dtype, torch.float32)
    )
    padded_RCM[..., :length] = x_RMC.transpose(1, 2)
    return torch.fft.rfft(padded_RCM)


def _channel_steps(x_RMD: Tensor) -> Iterator[slice]:
    rows, length, d_model = x_RMD.shape
    channels = max(1, min(d_model, _STEP_ELEMENTS // (rows * fft_length(length))))
    for first in range(0, d_model, channels):
        yield slice(first, min(first + channels, d_model))

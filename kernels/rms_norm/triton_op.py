"""RMS norm by Triton, alone or after a residual sum, as operators that torch.compile and checkpointing take as one node.

Keeps the normalised tensor (the new residual stream, which lives anyway), one number a row and the seed of dropout.
The gradient of the weight is summed from one partial sum a program, in an order that is always the same.

Shapes: B batch, L length, D d_model, X rows.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from spade_t5.kernels.launch import LaunchConfig, adjacent_rows, launch_config, operator
from spade_t5.kernels.rms_norm.triton_kernels import rms_norm_bwd_kernel, rms_norm_fwd_kernel

_SMALLEST_CLASS, _LARGEST_CLASS = 128, 8192

# The backward pass holds fewer than 8 wider rows in a tile, so little of each sector of a (B, D, L) tensor that a copy
# to rows comes first.
_WIDEST_TRANSPOSED = 1024


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * (x * rsqrt(mean(x^2) + eps)); arguments and result as of `rms_norm`, unchecked."""
    return _norm(x, weight, eps, with_transpose=False)[0]


def rms_norm_with_transpose_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `rms_norm_with_transpose`, unchecked."""
    y, y_BDL = _norm(x, weight, eps, with_transpose=True)
    return y, y_BDL.transpose(1, 2)


def _norm(x: Tensor, weight: Tensor, eps: float, with_transpose: bool) -> tuple[Tensor, Tensor]:
    is_transposed = (
        x.dim() == 3
        and not x.is_contiguous()
        and x.transpose(1, 2).is_contiguous()
        and x.shape[2] <= _WIDEST_TRANSPOSED
    )
    y, y_BDL, _ = _forward(x.transpose(1, 2) if is_transposed else x, weight, eps, is_transposed, with_transpose)
    return y, y_BDL


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `add_rms_norm`, unchecked."""
    r, y, _, _ = _add_forward(x, residual, weight, _seed(x, dropout_p), eps, dropout_p, with_transpose=False)
    return r, y


def add_rms_norm_with_transpose_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as of `add_rms_norm_with_transpose`, unchecked."""
    r, y, y_BDL, _ = _add_forward(x, residual, weight, _seed(x, dropout_p), eps, dropout_p, with_transpose=True)
    return r, y, y_BDL.transpose(1, 2)


def _seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """Drawn where the tensors are, from PyTorch's generator, which checkpointing rewinds before it computes again."""
    if dropout_p == 0.0:
        return None
    return torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=x.device)


@operator("rms_norm")
def _forward(
    x: Tensor, weight: Tensor, eps: float, is_transposed: bool, with_transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, y_BDL, rstd_X = _empty_results(x, is_transposed, with_transpose)
    _launch_forward(x, None, weight, None, eps, 0.0, None, y, y_BDL, rstd_X, is_transposed)
    return y, y_BDL, rstd_X


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, is_transposed: bool, with_transpose: bool) -> tuple[Tensor, ...]:
    return _empty_results(x, is_transposed, with_transpose)


@operator("add_rms_norm")
def _add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    with_transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = _empty_sum(x, residual)
    y, y_BDL, rstd_X = _empty_results(r, False, with_transpose)
    _launch_forward(x, residual, weight, seed, eps, dropout_p, r, y, y_BDL, rstd_X, False)
    return r, y, y_BDL, rstd_X


@_add_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    with_transpose: bool,
) -> tuple[Tensor, ...]:
    r = _empty_sum(x, residual)
    return r, *_empty_results(r, False, with_transpose)


def _empty_sum(x: Tensor, residual: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)


def _empty_results(r: Tensor, is_transposed: bool, with_transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the norm as (B, D, L) or an empty tensor, and one number a row; `r` is (B, D, L) if transposed."""
    shape = r.transpose(1, 2).shape if is_transposed else r.shape
    y = torch.empty(shape, dtype=r.dtype, device=r.device)
    y_BDL = torch.empty((shape[0], shape[2], shape[1]) if with_transpose else (0,), dtype=r.dtype, device=r.device)
    return y, y_BDL, torch.empty(y.numel() // shape[-1], dtype=torch.float32, device=r.device)


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    r: Tensor | None,
    y: Tensor,
    y_BDL: Tensor,
    rstd_X: Tensor,
    is_transposed: bool,
) -> None:
    with_transpose = y_BDL.numel() > 0
    batch, length = _entries(y, is_transposed or with_transpose)
    block_d, config = _config("fwd", y, is_transposed or with_transpose)
    tiles_per_entry = triton.cdiv(length, config["ROWS"])
    x_XD = x if is_transposed else adjacent_rows(x)
    residual_XD = None if residual is None else adjacent_rows(residual)
    threshold, scale = _dropout(dropout_p)
    rms_norm_fwd_kernel[(batch * tiles_per_entry,)](
        x_XD,
        residual_XD,
        weight.contiguous(),
        seed,
        r,
        y,
        y_BDL if with_transpose else None,
        rstd_X,
        stride_x=x_XD.stride(0),
        stride_residual=0 if residual_XD is None else residual_XD.stride(0),
        L=length,
        D=y.shape[-1],
        tiles_per_entry=tiles_per_entry,
        eps=eps,
        threshold=threshold,
        scale=scale,
        X_TRANSPOSED=is_transposed,
        BLOCK_D=block_d,
        **config,
    )


@operator("rms_norm_backward")
def _backward(
    dy: Tensor | None,
    dy_BDL: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd_X: Tensor,
    is_transposed: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight_D = _launch_backward(None, dy, dy_BDL, x, weight, rstd_X, None, 0.0, None, dx, is_transposed, needs_dweight)
    return dx, dweight_D


@_backward.register_fake
def _(
    dy: Tensor | None,
    dy_BDL: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd_X: Tensor,
    is_transposed: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape if needs_dweight else (0,))


@operator("add_rms_norm_backward")
def _add_backward(
    dr: Tensor | None,
    dy: Tensor | None,
    dy_BDL: Tensor | None,
    r: Tensor,
    weight: Tensor,
    rstd_X: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dresidual = _empty_gradients(r, seed, x_dtype, residual_dtype)
    dweight_D = _launch_backward(
        dr,
        dy,
        dy_BDL,
        r,
        weight,
        rstd_X,
        seed,
        dropout_p,
        dx if dx.numel() else None,
        dresidual,
        False,
        needs_dweight,
    )
    return dx, dresidual, dweight_D


@_add_backward.register_fake
def _(
    dr: Tensor | None,
    dy: Tensor | None,
    dy_BDL: Tensor | None,
    r: Tensor,
    weight: Tensor,
    rstd_X: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty_gradients(r, seed, x_dtype, residual_dtype), weight.new_empty(
        weight.shape if needs_dweight else (0,)
    )


def _empty_gradients(
    r: Tensor, seed: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """For dx and dresidual; dx is empty where it would equal dresidual."""
    is_same = seed is None and x_dtype == residual_dtype
    dx = torch.empty((0,) if is_same else r.shape, dtype=x_dtype, device=r.device)
    return dx, torch.empty(r.shape, dtype=residual_dtype, device=r.device)


def _launch_backward(
    dr: Tensor | None,
    dy: Tensor | None,
    dy_BDL: Tensor | None,
    r: Tensor,
    weight: Tensor,
    rstd_X: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dx: Tensor | None,
    dresidual: Tensor,
    is_transposed: bool,
    needs_dweight: bool,
) -> Tensor:
    if dy_BDL is not None and dy_BDL.shape[1] > _WIDEST_TRANSPOSED:
        dy_t = dy_BDL.transpose(1, 2)
        dy, dy_BDL = (dy_t if dy is None else dy + dy_t), None
    shaped = r.transpose(1, 2) if is_transposed else r
    has_transposed = is_transposed or dy_BDL is not None
    batch, length = _entries(shaped, has_transposed)
    block_d, config = _config("bwd", shaped, has_transposed)
    tiles_per_entry = triton.cdiv(length, config["ROWS"])
    num_programs = min(batch * tiles_per_entry, config.pop("PROGRAMS"))
    d_model = len(weight)
    dweight_PD = torch.empty(num_programs, d_model, dtype=torch.float32, device=r.device) if needs_dweight else None
    dr_XD, dy_XD = (None if gradient is None else adjacent_rows(gradient) for gradient in (dr, dy))
    r_XD = r if is_transposed else adjacent_rows(r)
    threshold, scale = _dropout(dropout_p)
    rms_norm_bwd_kernel[(num_programs,)](
        dr_XD,
        dy_XD,
        None if dy_BDL is None else dy_BDL.contiguous(),
        r_XD,
        weight.contiguous(),
        rstd_X,
        seed,
        dx,
        dresidual,
        dweight_PD,
        stride_dr=0 if dr_XD is None else dr_XD.stride(0),
        stride_dy=0 if dy_XD is None else dy_XD.stride(0),
        stride_r=r_XD.stride(0),
        L=length,
        D=d_model,
        tiles_per_entry=tiles_per_entry,
        num_tiles=batch * tiles_per_entry,
        threshold=threshold,
        scale=scale,
        R_TRANSPOSED=is_transposed,
        BLOCK_D=block_d,
        **config,
    )
    return weight.new_empty(0) if dweight_PD is None else dweight_PD.sum(dim=0).to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.is_transposed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[2])


def _gradients(ctx: Any, dy: Tensor | None, dy_BDL: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dweight = ctx.needs_input_grad[1]
    dx, dweight_D = _backward(dy, _given(dy_BDL), *ctx.saved_tensors, ctx.is_transposed, needs_dweight)
    return dx, dweight_D if needs_dweight else None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, seed, _, ctx.dropout_p, _ = inputs
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight, output[3], seed)


def _add_gradients(
    ctx: Any, dr: Tensor | None, dy: Tensor | None, dy_BDL: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_dweight = ctx.needs_input_grad[2]
    dx, dresidual, dweight_D = _add_backward(
        dr,
        dy,
        _given(dy_BDL),
        *ctx.saved_tensors,
        ctx.dropout_p,
        ctx.x_dtype,
        ctx.residual_dtype,
        needs_dweight,
    )
    return dx if dx.numel() else dresidual, dresidual, dweight_D if needs_dweight else None, None, None, None, None


_add_forward.register_autograd(_add_gradients, setup_context=_add_setup_context)


def _given(gradient: Tensor | None) -> Tensor | None:
    """None for the gradient of an output that was not asked for, which torch.compile passes as an empty tensor."""
    return None if gradient is None or gradient.numel() == 0 else gradient


def _dropout(dropout_p: float) -> tuple[int, float]:
    """The threshold that 31 random bits must reach for an entry to be kept, and the factor of those that are."""
    return round(dropout_p * 2**31), 1.0 / (1.0 - dropout_p)


def _entries(y: Tensor, is_split: bool) -> tuple[int, int]:
    """Batch entries and rows in each: all rows are one entry unless a transposed tensor splits them."""
    return (y.shape[0], y.shape[1]) if is_split else (1, y.numel() // y.shape[-1])


def _config(kernel: str, y: Tensor, has_transposed: bool) -> tuple[int, LaunchConfig]:
    """Columns of a tile, which hold a whole row, and the launch of their class."""
    block_d = max(_SMALLEST_CLASS, triton.next_power_of_2(y.shape[-1]))
    if block_d > _LARGEST_CLASS:
        raise ValueError(f"x has {y.shape[-1]} columns; the Triton kernels take {_LARGEST_CLASS}: use backend 'torch'")
    variant = f"{kernel}{'_transposed' if has_transposed else ''}/d{block_d}"
    return block_d, dict(launch_config("rms_norm", variant, y.device))

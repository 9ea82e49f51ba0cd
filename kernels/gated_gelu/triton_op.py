"""Gated GELU by Triton, as operators that torch.compile, checkpointing and autocast take as one node each.

Keeps its two inputs for the backward pass and nothing else.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from spade_t5.kernels.gated_gelu.triton_kernels import gated_gelu_bwd_kernel, gated_gelu_fwd_kernel
from spade_t5.kernels.launch import adjacent_rows, launch_config, operator


def gated_gelu_triton(a: Tensor, b: Tensor) -> Tensor:
    """Return h = gelu_tanh(a) * b; arguments and result as of `gated_gelu`, unchecked."""
    return _forward(a, b)


@operator("gated_gelu")
def _forward(a: Tensor, b: Tensor) -> Tensor:
    a_XF, b_XF = adjacent_rows(a), adjacent_rows(b)
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    num_rows, d_ff = a_XF.shape
    config = launch_config("gated_gelu", "fwd", a.device)
    gated_gelu_fwd_kernel[num_rows, triton.cdiv(d_ff, config["BLOCK"])](
        a_XF, b_XF, h, stride_a=a_XF.stride(0), stride_b=b_XF.stride(0), F=d_ff, **config
    )
    return h


@_forward.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@operator("gated_gelu_backward")
def _backward(a: Tensor, b: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    a_XF, b_XF, dh_XF = adjacent_rows(a), adjacent_rows(b), adjacent_rows(dh)
    da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
    num_rows, d_ff = a_XF.shape
    config = launch_config("gated_gelu", "bwd", a.device)
    gated_gelu_bwd_kernel[num_rows, triton.cdiv(d_ff, config["BLOCK"])](
        a_XF,
        b_XF,
        dh_XF,
        da,
        db,
        stride_a=a_XF.stride(0),
        stride_b=b_XF.stride(0),
        stride_dh=dh_XF.stride(0),
        F=d_ff,
        **config,
    )
    return da, db


@_backward.register_fake
def _(a: Tensor, b: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
    return da, db


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(*ctx.saved_tensors, dh)


_forward.register_autograd(_gradients, setup_context=_setup_context)

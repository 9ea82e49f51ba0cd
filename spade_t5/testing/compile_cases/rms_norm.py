"""RMS norm alone (of either layout) and after a residual sum, forward and backward, at models' widths."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from spade_t5.kernels.rms_norm.triton_op import (
    add_rms_norm_triton,
    add_rms_norm_with_transpose_triton,
    rms_norm_triton,
    rms_norm_with_transpose_triton,
)

_EPS = 1e-6


def _ones(d_model: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(2, 64, d_model, dtype=dtype, requires_grad=True)


def _weight(d_model: int) -> Tensor:
    return torch.ones(d_model, requires_grad=True)


def _backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _norm(d_model: int, dtype: torch.dtype) -> None:
    _backward(rms_norm_triton(_ones(d_model, dtype), _weight(d_model), _EPS))


def _norm_of_transposed(d_model: int, dtype: torch.dtype) -> None:
    x = torch.ones(2, d_model, 64, dtype=dtype, requires_grad=True)
    _backward(rms_norm_triton(x.transpose(1, 2), _weight(d_model), _EPS))


def _norm_with_transpose(d_model: int, dtype: torch.dtype) -> None:
    _backward(*rms_norm_with_transpose_triton(_ones(d_model, dtype), _weight(d_model), _EPS))


def _add(d_model: int, dtype: torch.dtype, residual_dtype: torch.dtype, dropout_p: float) -> None:
    x, residual = _ones(d_model, dtype), _ones(d_model, residual_dtype)
    _backward(*add_rms_norm_triton(x, residual, _weight(d_model), _EPS, dropout_p))


def _add_with_transpose(d_model: int, dtype: torch.dtype, dropout_p: float) -> None:
    x, residual = _ones(d_model, dtype), _ones(d_model, dtype)
    _backward(*add_rms_norm_with_transpose_triton(x, residual, _weight(d_model), _EPS, dropout_p))


def _cases() -> dict[str, Callable[[], None]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases: dict[str, Callable[[], None]] = {}
    # Every entry of the launch table, with the kernels that need most registers.
    for d_model in (128, 256, 512, 1024, 2048, 4096, 8192):
        cases[f"add_dropout/d{d_model}"] = functools.partial(_add, d_model, bf16, bf16, 0.1)
        cases[f"add_with_transpose/d{d_model}"] = functools.partial(_add_with_transpose, d_model, bf16, 0.1)
    # Everything else, at the width of a base model.
    for dtype in (bf16, fp32):
        name = str(dtype).removeprefix("torch.")
        cases[f"norm/{name}"] = functools.partial(_norm, 768, dtype)
        cases[f"norm_of_transposed/{name}"] = functools.partial(_norm_of_transposed, 768, dtype)
        cases[f"norm_with_transpose/{name}"] = functools.partial(_norm_with_transpose, 768, dtype)
        cases[f"add/{name}"] = functools.partial(_add, 768, dtype, dtype, 0.0)
    cases["add_dropout/autocast"] = functools.partial(_add, 768, bf16, fp32, 0.1)
    cases["add_dropout/float16"] = functools.partial(_add, 768, fp16, fp16, 0.1)
    cases["add_dropout/float32"] = functools.partial(_add, 768, fp32, fp32, 0.1)
    cases["add_with_transpose/float32"] = functools.partial(_add_with_transpose, 768, fp32, 0.1)
    cases["norm/odd_width"] = functools.partial(_norm, 700, bf16)
    return cases


CASES = _cases()

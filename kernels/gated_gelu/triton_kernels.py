"""Gated GELU on a GPU: one program for each BLOCK columns of a row, forward and backward.

Letters: X rows, F columns. The tanh form is written with the logistic function, (1 + tanh z) / 2 = sigmoid(2 z), as
libdevice's tanh does not run in the interpreter.
"""

import triton
import triton.language as tl

_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def gated_gelu_fwd_kernel(p_a, p_b, p_h, stride_a, stride_b, F, BLOCK: tl.constexpr):
    """H = gelu(a) * b for one row and BLOCK columns."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    b_a = tl.load(p_a + i_row * stride_a + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + i_row * stride_b + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_gate = tl.sigmoid((b_a + b_a * b_a * b_a * _CUBIC) * _SLOPE)
    tl.store(p_h + i_row * F + o_f, (b_a * b_gate * b_b).to(p_h.dtype.element_ty), mask=m_f)


@triton.jit
def gated_gelu_bwd_kernel(p_a, p_b, p_dh, p_da, p_db, stride_a, stride_b, stride_dh, F, BLOCK: tl.constexpr):
    """Da = dh * b * gelu'(a) and db = dh * gelu(a) for one row and BLOCK columns."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_f = o_f < F
    b_a = tl.load(p_a + i_row * stride_a + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + i_row * stride_b + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_dh = tl.load(p_dh + i_row * stride_dh + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_gate = tl.sigmoid((b_a + b_a * b_a * b_a * _CUBIC) * _SLOPE)
    b_slope = b_gate + b_a * b_gate * (1.0 - b_gate) * (b_a * b_a * (3.0 * _CUBIC) + 1.0) * _SLOPE
    tl.store(p_da + i_row * F + o_f, (b_dh * b_b * b_slope).to(p_da.dtype.element_ty), mask=m_f)
    tl.store(p_db + i_row * F + o_f, (b_dh * b_a * b_gate).to(p_db.dtype.element_ty), mask=m_f)

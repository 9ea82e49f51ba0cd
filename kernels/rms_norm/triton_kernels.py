"""RMS norm on a GPU, alone or after a residual sum with dropout: one program for a tile of whole rows.

Letters: B batch, L rows of a batch entry, D columns. What is not transposed is taken as one batch entry (B = 1).
A transposed tensor has (B, D, L) memory: neighbouring rows are adjacent there, so that its tiles want more rows.

Dropout draws its bits from a counter (seed, row, column), four columns a draw, so the backward pass draws the same again
whatever its tiles are.
"""

import triton
import triton.language as tl


@triton.jit
def _keep_mask(p_seed, o_row, threshold, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Entries that dropout keeps: those whose 31 random bits reach the threshold."""
    QUADS: tl.constexpr = BLOCK_D // 4
    b_zero = tl.zeros([ROWS, QUADS], dtype=tl.uint32)
    b_column = b_zero + tl.arange(0, QUADS)[None, :].to(tl.uint32)
    b_row = b_zero + o_row[:, None].to(tl.uint32)
    b_row_high = b_zero + (o_row >> 32)[:, None].to(tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), b_column, b_row, b_row_high, b_zero)
    b_bits = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [ROWS, BLOCK_D])
    return (b_bits >> 1).to(tl.int32) >= threshold


@triton.jit
def rms_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_seed,
    p_r,
    p_y,
    p_y_t,
    p_rstd,
    stride_x,
    stride_residual,
    L,
    D,
    tiles_per_entry,
    eps,
    threshold,
    scale,
    X_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """R = residual + dropout(x) where there is a residual, else x;   y = weight * (r rsqrt(mean(r^2) + eps))."""
    i_tile = tl.program_id(0)
    i_b = (i_tile // tiles_per_entry).to(tl.int64)
    o_l = (i_tile % tiles_per_entry) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_l = o_l < L
    m_d = o_d < D
    m = m_l[:, None] & m_d[None, :]
    o_row = i_b * L + o_l
    o_t = i_b * L * D + o_d.to(tl.int64)[None, :] * L + o_l[:, None]
    if X_TRANSPOSED:
        b_r = tl.load(p_x + o_t, mask=m, other=0.0).to(tl.float32)
    else:
        b_r = tl.load(p_x + o_row[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    o_out = o_row[:, None] * D + o_d[None, :]
    if p_residual is not None:
        b_residual = tl.load(p_residual + o_row[:, None] * stride_residual + o_d[None, :], mask=m, other=0.0)
        if p_seed is not None:
            b_r = tl.where(_keep_mask(p_seed, o_row, threshold, ROWS, BLOCK_D), b_r * scale, 0.0)
        b_stored = (b_residual.to(tl.float32) + b_r).to(p_r.dtype.element_ty)
        tl.store(p_r + o_out, b_stored, mask=m)
        # The statistics are of the values that the backward pass reads.
        b_r = b_stored.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_r * b_r, axis=1) / D + eps)
    tl.store(p_rstd + o_row, b_rstd, mask=m_l)
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    # T5 casts back before it multiplies.
    b_n = (b_r * b_rstd[:, None]).to(p_y.dtype.element_ty).to(tl.float32)
    b_y = (b_n * b_weight[None, :]).to(p_y.dtype.element_ty)
    tl.store(p_y + o_out, b_y, mask=m)
    if p_y_t is not None:
        tl.store(p_y_t + o_t, b_y, mask=m)


@triton.jit
def rms_norm_bwd_kernel(
    p_dr,
    p_dy,
    p_dy_t,
    p_r,
    p_weight,
    p_rstd,
    p_seed,
    p_dx,
    p_dresidual,
    p_dweight,
    stride_dr,
    stride_dy,
    stride_r,
    L,
    D,
    tiles_per_entry,
    num_tiles,
    threshold,
    scale,
    R_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dresidual = rstd (h - n mean(h n)) + dr with n = r rstd, h = weight (dy + dy_t);   dx = dropout's mask of that.

    Without a residual p_dresidual takes dx. A program walks over tiles and stores its sum of dy n, one row of p_dweight.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for i_tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_b = (i_tile // tiles_per_entry).to(tl.int64)
        o_l = (i_tile % tiles_per_entry) * ROWS + tl.arange(0, ROWS)
        m_l = o_l < L
        m = m_l[:, None] & m_d[None, :]
        o_row = i_b * L + o_l
        o_t = i_b * L * D + o_d.to(tl.int64)[None, :] * L + o_l[:, None]
        if R_TRANSPOSED:
            b_n = tl.load(p_r + o_t, mask=m, other=0.0).to(tl.float32)
        else:
            b_n = tl.load(p_r + o_row[:, None] * stride_r + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_rstd = tl.load(p_rstd + o_row, mask=m_l, other=0.0)[:, None]
        b_n = b_n * b_rstd
        b_dy = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        if p_dy is not None:
            b_dy = tl.load(p_dy + o_row[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if p_dy_t is not None:
            b_dy += tl.load(p_dy_t + o_t, mask=m, other=0.0).to(tl.float32)
        if p_dweight is not None:
            b_dweight += b_dy * b_n
        b_h = b_dy * b_weight
        b_g = (b_h - b_n * (tl.sum(b_h * b_n, axis=1) / D)[:, None]) * b_rstd
        if p_dr is not None:
            b_g += tl.load(p_dr + o_row[:, None] * stride_dr + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        o_out = o_row[:, None] * D + o_d[None, :]
        if R_TRANSPOSED:
            o_out = o_t
        tl.store(p_dresidual + o_out, b_g.to(p_dresidual.dtype.element_ty), mask=m)
        if p_dx is not None:
            if p_seed is not None:
                b_g = tl.where(_keep_mask(p_seed, o_row, threshold, ROWS, BLOCK_D), b_g * scale, 0.0)
            tl.store(p_dx + o_out, b_g.to(p_dx.dtype.element_ty), mask=m)
    if p_dweight is not None:
        o_partial = tl.program_id(0).to(tl.int64) * D + o_d
        tl.store(p_dweight + o_partial, tl.sum(b_dweight, axis=0), mask=m_d)

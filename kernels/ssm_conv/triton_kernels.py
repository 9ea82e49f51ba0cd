"""The chunked convolution on a GPU: states that chunks add, their recurrence, outputs; and the gradients of the system.

Letters: D channels, X columns = chunks of all rows (column x is chunk x % C of row x // C), T tokens of a chunk, S sides,
N states a side. A tile holds BLOCK_X columns as its rows, so that each has a scale of its own, and
tokens or states, which are adjacent in memory, side by side in a row.

A side runs forward (a chunk's last document sends, its first receives) or mirrored; REVERSED turns both sides round, and
with the matrices transposed that is the adjoint, so one set of kernels serves both passes.

In half precision (SCALED) the tokens and the states of each column are brought just below 2^15 by a power of two and cast
to float16. Sums are in float32 and each column is undone by itself, so nothing overflows, and entries keep all their bits
down to 2^-29 of the column's largest.
"""

import triton
import triton.language as tl

_SCALE_FIELD = tl.constexpr(268)  # exponent fields of x and of the scale that brings x into [2^14, 2^15) add up to this
_INVERSE_FIELDS = tl.constexpr(254)  # those of a power of two and its inverse
_MANTISSA_BITS = tl.constexpr(23)


@triton.jit
def ssm_chunk_states_kernel(
    p_u,
    p_w,
    p_piece,
    p_num_pieces,
    p_added,
    p_unscale,
    stride_u_b,
    stride_u_d,
    stride_w_d,
    stride_w_r,
    stride_w_t,
    L,
    num_chunks,
    num_columns,
    N,
    T: tl.constexpr,
    SIDES: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Added = W U for BLOCK_X columns and BLOCK_N states of each side, and the factor that undoes the tokens' scale."""
    i_d = tl.program_id(1).to(tl.int64)
    i_x = tl.program_id(0) // tl.cdiv(N, BLOCK_N)
    i_n = tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    o_x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < num_columns
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_token, o_left = _columns(o_x, i_d, stride_u_b, stride_u_d, L, num_chunks, T)

    if SCALED:
        b_largest = tl.zeros((BLOCK_X,), dtype=tl.float32)
        # Unrolled, so that all loads are on their way at once.
        for i_t in tl.static_range(0, T, BLOCK_T):
            o_t = i_t + tl.arange(0, BLOCK_T)
            b_u = _load_tokens(p_u, o_token, o_left, m_x, o_t)
            if PACKED:
                b_u = tl.where(_load_pieces(p_piece, o_x, m_x, o_t, T) >= 0, b_u, 0.0)
            b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_u), axis=1))
        b_scale, b_unscale = _powers_of_two(b_largest)
        tl.store(p_unscale + i_d * num_columns + o_x, b_unscale, mask=m_x)

    if PACKED:
        b_last = tl.load(p_num_pieces + o_x, mask=m_x, other=1) - 1
    b_first_side = tl.zeros((BLOCK_X, BLOCK_N), dtype=tl.float32)
    b_second_side = tl.zeros((BLOCK_X, BLOCK_N), dtype=tl.float32)
    for i_t in range(0, T, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        b_u = _load_tokens(p_u, o_token, o_left, m_x, o_t)
        if SCALED:
            b_u = b_u * b_scale[:, None]
        if PACKED:
            b_piece = _load_pieces(p_piece, o_x, m_x, o_t, T)
            b_sent = tl.where(b_piece == (0 if REVERSED else b_last[:, None]), b_u, 0.0)
        else:
            b_sent = b_u
        b_w = _load_w(p_w, i_d, o_n, o_t, 0, stride_w_d, stride_w_r, stride_w_t, N)
        b_first_side = tl.dot(b_sent.to(b_w.dtype), b_w, b_first_side, input_precision="ieee")
        if SIDES == 2:
            if PACKED:
                b_sent = tl.where(b_piece == (b_last[:, None] if REVERSED else 0), b_u, 0.0)
            b_w = _load_w(p_w, i_d, o_n, o_t, 1, stride_w_d, stride_w_r, stride_w_t, N)
            b_second_side = tl.dot(b_sent.to(b_w.dtype), b_w, b_second_side, input_precision="ieee")

    if SCALED:
        b_first_side = b_first_side * b_unscale[:, None]
        b_second_side = b_second_side * b_unscale[:, None]
    p_tile = p_added + (i_d * num_columns + o_x[:, None]) * (SIDES * N) + o_n[None, :]
    m_tile = m_x[:, None] & (o_n < N)[None, :]
    tl.store(p_tile, b_first_side, mask=m_tile)
    if SIDES == 2:
        tl.store(p_tile + N, b_second_side, mask=m_tile)


@triton.jit
def ssm_chunk_recurrence_dense_kernel(
    p_added,
    p_transition,
    p_num_pieces,
    p_is_linked,
    p_states,
    p_unscale,
    num_chunks,
    num_columns,
    N,
    SIDES: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """States that reach each chunk of one row, channel and side: s = A s + added, chunk after chunk.

    The transition comes with the index it is summed over first: then a sum runs over registers of a thread.
    """
    i_d = tl.program_id(0).to(tl.int64)
    i_side = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    is_mirrored = (i_side == 1) != REVERSED
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_a = tl.load(
        p_transition + i_d * N * N + o_n[:, None] * N + o_n[None, :], mask=m_n[:, None] & m_n[None, :], other=0.0
    )
    b_s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_step in tl.range(0, num_chunks, num_stages=3):
        i_chunk = tl.where(is_mirrored, num_chunks - 1 - i_step, i_step)
        i_column = i_d * num_columns + i_b * num_chunks + i_chunk
        b_added = tl.load(p_added + i_column * (SIDES * N) + i_side * N + o_n, mask=m_n, other=0.0)
        if PACKED:
            b_s = tl.where(_is_linked(p_is_linked, i_b, i_chunk, is_mirrored, num_chunks), b_s, 0.0)
        b_stored = b_s
        if SCALED:
            b_scale, b_unscale = _powers_of_two(tl.max(tl.abs(b_s), axis=0))
            tl.store(p_unscale + i_column * SIDES + i_side, b_unscale)
            b_stored = b_s * b_scale
        p_tile = p_states + i_column * (SIDES * N) + i_side * N + o_n
        tl.store(p_tile, b_stored.to(p_states.dtype.element_ty), mask=m_n)
        b_next = tl.sum(b_a * b_s[:, None], axis=0)
        if PACKED:
            b_next = tl.where(tl.load(p_num_pieces + i_b * num_chunks + i_chunk) == 1, b_next, 0.0)
        b_s = b_next + b_added


@triton.jit
def ssm_chunk_recurrence_diagonal_kernel(
    p_added,
    p_transition,
    p_num_pieces,
    p_is_linked,
    p_states,
    p_unscale,
    num_chunks,
    num_columns,
    N,
    SIDES: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same with one complex number for each pair of states; the adjoint multiplies with the conjugate."""
    i_d = tl.program_id(0).to(tl.int64)
    i_side = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    is_mirrored = (i_side == 1) != REVERSED
    num_pairs = N // 2
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < num_pairs
    b_a_re = tl.load(p_transition + i_d * N + o_n, mask=m_n, other=0.0)
    b_a_im = tl.load(p_transition + i_d * N + num_pairs + o_n, mask=m_n, other=0.0)
    if REVERSED:
        b_a_im = -b_a_im
    b_re = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_im = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_step in tl.range(0, num_chunks, num_stages=3):
        i_chunk = tl.where(is_mirrored, num_chunks - 1 - i_step, i_step)
        i_column = i_d * num_columns + i_b * num_chunks + i_chunk
        p_tile = p_added + i_column * (SIDES * N) + i_side * N + o_n
        b_added_re = tl.load(p_tile, mask=m_n, other=0.0)
        b_added_im = tl.load(p_tile + num_pairs, mask=m_n, other=0.0)
        if PACKED:
            b_is_linked = _is_linked(p_is_linked, i_b, i_chunk, is_mirrored, num_chunks)
            b_re = tl.where(b_is_linked, b_re, 0.0)
            b_im = tl.where(b_is_linked, b_im, 0.0)
        b_stored_re = b_re
        b_stored_im = b_im
        if SCALED:
            b_scale, b_unscale = _powers_of_two(tl.max(tl.maximum(tl.abs(b_re), tl.abs(b_im)), axis=0))
            tl.store(p_unscale + i_column * SIDES + i_side, b_unscale)
            b_stored_re = b_re * b_scale
            b_stored_im = b_im * b_scale
        p_tile = p_states + i_column * (SIDES * N) + i_side * N + o_n
        tl.store(p_tile, b_stored_re.to(p_states.dtype.element_ty), mask=m_n)
        tl.store(p_tile + num_pairs, b_stored_im.to(p_states.dtype.element_ty), mask=m_n)
        b_next_re = b_a_re * b_re - b_a_im * b_im
        b_next_im = b_a_re * b_im + b_a_im * b_re
        if PACKED:
            b_is_one_piece = tl.load(p_num_pieces + i_b * num_chunks + i_chunk) == 1
            b_next_re = tl.where(b_is_one_piece, b_next_re, 0.0)
            b_next_im = tl.where(b_is_one_piece, b_next_im, 0.0)
        b_re = b_next_re + b_added_re
        b_im = b_next_im + b_added_im


@triton.jit
def ssm_chunk_outputs_kernel(
    p_u,
    p_local,
    p_p,
    p_states,
    p_unscale_u,
    p_unscale_s,
    p_piece,
    p_num_pieces,
    p_y,
    stride_u_b,
    stride_u_d,
    stride_y_b,
    stride_y_d,
    stride_local_d,
    stride_local_i,
    stride_local_j,
    stride_p_d,
    stride_p_t,
    stride_p_r,
    L,
    num_chunks,
    num_columns,
    N,
    T: tl.constexpr,
    SIDES: tl.constexpr,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Y = M U + P s for BLOCK_X columns and BLOCK_T tokens of each."""
    i_d = tl.program_id(1).to(tl.int64)
    i_x = tl.program_id(0) // (T // BLOCK_T)
    i_t = tl.program_id(0) % (T // BLOCK_T)
    o_x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < num_columns
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_column = i_d * num_columns + o_x
    if PACKED:
        b_num_pieces = tl.load(p_num_pieces + o_x, mask=m_x, other=1)
        b_piece = _load_pieces(p_piece, o_x, m_x, o_t, T)

    b_y = tl.zeros((BLOCK_X, BLOCK_T), dtype=tl.float32)
    for i_side in tl.static_range(SIDES):
        b_part = tl.zeros((BLOCK_X, BLOCK_T), dtype=tl.float32)
        for i_n in range(0, N, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            p_tile = p_states + o_column[:, None] * (SIDES * N) + i_side * N + o_n[None, :]
            b_s = tl.load(p_tile, mask=m_x[:, None] & m_n[None, :], other=0.0)
            p_tile = (p_p + i_d * stride_p_d) + (o_t[None, :] * stride_p_t + (i_side * N + o_n)[:, None] * stride_p_r)
            b_p = tl.load(p_tile, mask=m_n[:, None], other=0.0)
            b_part = tl.dot(b_s, b_p, b_part, input_precision="ieee")
        if SCALED:
            b_part = b_part * tl.load(p_unscale_s + o_column * SIDES + i_side, mask=m_x, other=0.0)[:, None]
        if PACKED:
            b_reached = (b_num_pieces[:, None] - 1) if (i_side == 1) != REVERSED else 0
            b_part = tl.where(b_piece == b_reached, b_part, 0.0)
        b_y += b_part

    o_token, o_left = _columns(o_x, i_d, stride_u_b, stride_u_d, L, num_chunks, T)
    num_passes = 1
    if PACKED:
        num_passes = tl.max(b_num_pieces, axis=0)
    if SCALED:
        b_unscale = tl.load(p_unscale_u + o_column, mask=m_x, other=1.0)
        b_scale = _inverse_power_of_two(b_unscale)
    for i_piece in range(0, num_passes):
        b_part = tl.zeros((BLOCK_X, BLOCK_T), dtype=tl.float32)
        for i_j in range(0, T, BLOCK_J):
            o_j = i_j + tl.arange(0, BLOCK_J)
            b_u = _load_tokens(p_u, o_token, o_left, m_x, o_j)
            if SCALED:
                b_u = b_u * b_scale[:, None]
            if PACKED:
                b_u = tl.where(_load_pieces(p_piece, o_x, m_x, o_j, T) == i_piece, b_u, 0.0)
            o_tile = o_t[None, :] * stride_local_i + o_j[:, None] * stride_local_j
            p_tile = (p_local + i_d * stride_local_d) + o_tile
            b_part = tl.dot(b_u.to(p_local.dtype.element_ty), tl.load(p_tile), b_part, input_precision="ieee")
        if SCALED:
            b_part = b_part * b_unscale[:, None]
        if PACKED:
            b_part = tl.where(b_piece == i_piece, b_part, 0.0)
        b_y += b_part

    o_token, o_left = _columns(o_x, i_d, stride_y_b, stride_y_d, L, num_chunks, T)
    m_tile = m_x[:, None] & (o_t[None, :] < o_left[:, None])
    tl.store(p_y + o_token[:, None] + o_t[None, :], b_y.to(p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def ssm_chunk_dlocal_kernel(
    p_dy,
    p_u,
    p_piece,
    p_num_pieces,
    p_dlocal,
    stride_dy_b,
    stride_dy_d,
    stride_u_b,
    stride_u_d,
    L,
    num_chunks,
    num_columns,
    T: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """DM_ij = sum over columns of dy_i u_j, where i and j are of one document."""
    i_d = tl.program_id(1).to(tl.int64)
    o_i = tl.program_id(0) // (T // BLOCK_J) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_j = tl.program_id(0) % (T // BLOCK_J) * BLOCK_J + tl.arange(0, BLOCK_J)
    b_dlocal = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for i_x in range(0, num_columns, BLOCK_X):
        o_x = i_x + tl.arange(0, BLOCK_X)
        m_x = o_x < num_columns
        o_token, o_left = _columns(o_x, i_d, stride_dy_b, stride_dy_d, L, num_chunks, T)
        b_dy = _load_operand(p_dy, o_token, o_left, m_x, o_i, UPCAST)
        o_token, o_left = _columns(o_x, i_d, stride_u_b, stride_u_d, L, num_chunks, T)
        b_u = _load_operand(p_u, o_token, o_left, m_x, o_j, UPCAST)
        if PACKED:
            b_piece_i = _load_pieces(p_piece, o_x, m_x, o_i, T)
            b_piece_j = _load_pieces(p_piece, o_x, m_x, o_j, T)
            num_passes = tl.max(tl.load(p_num_pieces + o_x, mask=m_x, other=1), axis=0)
            for i_piece in range(0, num_passes):
                b_dy_inside = tl.where(b_piece_i == i_piece, b_dy, 0.0)
                b_u_inside = tl.where(b_piece_j == i_piece, b_u, 0.0)
                b_dlocal = tl.dot(tl.trans(b_dy_inside), b_u_inside, b_dlocal, input_precision="ieee")
        else:
            b_dlocal = tl.dot(tl.trans(b_dy), b_u, b_dlocal, input_precision="ieee")
    tl.store(p_dlocal + (i_d * T + o_i[:, None]) * T + o_j[None, :], b_dlocal)


@triton.jit
def ssm_chunk_dstates_kernel(
    p_x,
    p_states,
    p_unscale,
    p_largest_unscale,
    p_piece,
    p_num_pieces,
    p_out,
    stride_x_b,
    stride_x_d,
    L,
    num_chunks,
    num_columns,
    N,
    T: tl.constexpr,
    SIDES: tl.constexpr,
    SENDS: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Out_rt = sum over columns of states_r x_t, for the tokens that send to the states, or that they reach.

    With SENDS, states are dS and x is u: out is dW. Without, states are s and x is dy: out is the transpose of dP.
    """
    i_d = tl.program_id(1).to(tl.int64)
    i_side = tl.program_id(2)
    i_n = tl.program_id(0) // (T // BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_t = tl.program_id(0) % (T // BLOCK_T) * BLOCK_T + tl.arange(0, BLOCK_T)
    if SCALED:
        # Columns are summed, so they must be in one unit: the largest.
        largest_unscale = tl.load(p_largest_unscale + i_d * SIDES + i_side)
        common_scale = _inverse_power_of_two(largest_unscale)
    b_out = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for i_x in range(0, num_columns, BLOCK_X):
        o_x = i_x + tl.arange(0, BLOCK_X)
        m_x = o_x < num_columns
        o_column = i_d * num_columns + o_x
        o_token, o_left = _columns(o_x, i_d, stride_x_b, stride_x_d, L, num_chunks, T)
        b_x = _load_operand(p_x, o_token, o_left, m_x, o_t, UPCAST)
        if PACKED:
            b_last = tl.load(p_num_pieces + o_x, mask=m_x, other=1) - 1
            b_wanted = tl.where((i_side == 0) == SENDS, b_last, 0)
            b_x = tl.where(_load_pieces(p_piece, o_x, m_x, o_t, T) == b_wanted[:, None], b_x, 0.0)
        p_tile = p_states + o_column[:, None] * (SIDES * N) + i_side * N + o_n[None, :]
        b_s = tl.load(p_tile, mask=m_x[:, None] & m_n[None, :], other=0.0)
        if SCALED:
            b_unscale = tl.load(p_unscale + o_column * SIDES + i_side, mask=m_x, other=0.0)
            b_s = b_s.to(tl.float32) * (b_unscale * common_scale)[:, None]
        b_out = tl.dot(tl.trans(b_s.to(b_x.dtype)), b_x, b_out, input_precision="ieee")
    if SCALED:
        b_out = b_out * largest_unscale
    p_tile = p_out + (i_d * (SIDES * N) + i_side * N + o_n[:, None]) * T + o_t[None, :]
    tl.store(p_tile, b_out, mask=m_n[:, None])


@triton.jit
def ssm_chunk_dtransition_dense_kernel(
    p_dadded,
    p_states,
    p_unscale_d,
    p_unscale_s,
    p_num_pieces,
    p_out,
    num_columns,
    N,
    SIDES: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """DA_nm = sum over sides and columns without an edge of dS_n s_m."""
    i_d = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) // tl.cdiv(N, BLOCK_M) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(0) % tl.cdiv(N, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_out = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for i_side in tl.static_range(SIDES):
        for i_x in range(0, num_columns, BLOCK_X):
            o_x = i_x + tl.arange(0, BLOCK_X)
            m_x = o_x < num_columns
            if PACKED:
                m_x = m_x & (tl.load(p_num_pieces + o_x, mask=m_x, other=0) == 1)
            o_column = (i_d * num_columns + o_x) * SIDES + i_side
            b_d = _load_states(p_dadded, p_unscale_d, o_column, m_x, o_n, o_n < N, N, SCALED)
            b_s = _load_states(p_states, p_unscale_s, o_column, m_x, o_m, o_m < N, N, SCALED)
            b_out = tl.dot(tl.trans(b_d), b_s, b_out, input_precision="ieee")
    p_tile = p_out + (i_d * N + o_n[:, None]) * N + o_m[None, :]
    tl.store(p_tile, b_out, mask=(o_n < N)[:, None] & (o_m < N)[None, :])


@triton.jit
def ssm_chunk_dtransition_diagonal_kernel(
    p_dadded,
    p_states,
    p_unscale_d,
    p_unscale_s,
    p_num_pieces,
    p_out,
    num_columns,
    N,
    SIDES: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for pairs: dS times the conjugate of s."""
    i_d = tl.program_id(1).to(tl.int64)
    num_pairs = N // 2
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_pairs
    b_re = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_im = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_side in tl.static_range(SIDES):
        for i_x in range(0, num_columns, BLOCK_X):
            o_x = i_x + tl.arange(0, BLOCK_X)
            m_x = o_x < num_columns
            if PACKED:
                m_x = m_x & (tl.load(p_num_pieces + o_x, mask=m_x, other=0) == 1)
            o_column = (i_d * num_columns + o_x) * SIDES + i_side
            b_d_re = _load_states(p_dadded, p_unscale_d, o_column, m_x, o_n, m_n, N, SCALED)
            b_d_im = _load_states(p_dadded + num_pairs, p_unscale_d, o_column, m_x, o_n, m_n, N, SCALED)
            b_s_re = _load_states(p_states, p_unscale_s, o_column, m_x, o_n, m_n, N, SCALED)
            b_s_im = _load_states(p_states + num_pairs, p_unscale_s, o_column, m_x, o_n, m_n, N, SCALED)
            b_re += tl.sum(b_d_re * b_s_re + b_d_im * b_s_im, axis=0)
            b_im += tl.sum(b_d_im * b_s_re - b_d_re * b_s_im, axis=0)
    tl.store(p_out + i_d * N + o_n, b_re, mask=m_n)
    tl.store(p_out + i_d * N + num_pairs + o_n, b_im, mask=m_n)


@triton.jit
def _load_states(p_states, p_unscale, o_column, m_x, o_n, m_n, N, SCALED: tl.constexpr):
    """States o_n of a side of each column, in float32 and in their own unit; zero where a column does not count."""
    p_tile = p_states + o_column[:, None] * N + o_n[None, :]
    b_s = tl.load(p_tile, mask=m_x[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    if SCALED:
        b_s = b_s * tl.load(p_unscale + o_column, mask=m_x, other=0.0)[:, None]
    return b_s


@triton.jit
def _columns(o_x, i_d, stride_b, stride_d, L, num_chunks, T: tl.constexpr):
    """Offset of the first token of each column, and the tokens of the row from there on."""
    o_first = (o_x % num_chunks) * T
    return (o_x // num_chunks).to(tl.int64) * stride_b + i_d * stride_d + o_first, L - o_first


@triton.jit
def _load_tokens(p_x, o_token, o_left, m_x, o_t):
    """Tokens o_t of each column, in float32, zero behind the end of the row."""
    m_tile = m_x[:, None] & (o_t[None, :] < o_left[:, None])
    return tl.load(p_x + o_token[:, None] + o_t[None, :], mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def _load_operand(p_x, o_token, o_left, m_x, o_t, UPCAST: tl.constexpr):
    """The same in their own dtype, as operand of a product."""
    m_tile = m_x[:, None] & (o_t[None, :] < o_left[:, None])
    b_x = tl.load(p_x + o_token[:, None] + o_t[None, :], mask=m_tile, other=0.0)
    return b_x.to(tl.float32) if UPCAST else b_x


@triton.jit
def _load_pieces(p_piece, o_x, m_x, o_t, T: tl.constexpr):
    """Piece of tokens o_t of each column; -1 at padding."""
    p_tile = p_piece + o_x.to(tl.int64)[:, None] * T + o_t[None, :]
    return tl.load(p_tile, mask=m_x[:, None], other=-1).to(tl.int32)


@triton.jit
def _load_w(p_w, i_d, o_n, o_t, i_side, stride_d, stride_r, stride_t, N):
    """W' of BLOCK_T tokens and BLOCK_N states of a side."""
    p_tile = (p_w + i_d * stride_d) + ((i_side * N + o_n)[None, :] * stride_r + o_t[:, None] * stride_t)
    return tl.load(p_tile, mask=(o_n < N)[None, :], other=0.0)


@triton.jit
def _is_linked(p_is_linked, i_b, i_chunk, is_mirrored, num_chunks):
    """Whether the states that arrive are of this chunk's document; the edge they cross belongs to the later chunk."""
    i_edge = i_chunk + tl.where(is_mirrored, 1, 0)
    return tl.load(p_is_linked + i_b * num_chunks + i_edge, mask=i_edge < num_chunks, other=0) != 0


@triton.jit
def _powers_of_two(b_largest):
    """A power of two that brings the largest entry below 2^15, and its inverse; both are normal numbers."""
    b_field = -(b_largest.to(tl.int32, bitcast=True) >> _MANTISSA_BITS) + _SCALE_FIELD
    b_field = tl.minimum(tl.maximum(b_field, 1), 253)
    b_inverse_field = -b_field + _INVERSE_FIELDS
    b_scale = (b_field << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    return b_scale, (b_inverse_field << _MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_power_of_two(b_power):
    b_field = -(b_power.to(tl.int32, bitcast=True) >> _MANTISSA_BITS) + _INVERSE_FIELDS
    return (b_field << _MANTISSA_BITS).to(tl.float32, bitcast=True)

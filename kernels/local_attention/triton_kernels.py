"""Local attention on a GPU by tiles of BLOCK_M queries and BLOCK_N keys (flash attention, arXiv 2205.14135).

Tiles are aligned, hence the offsets of a tile depend only on its relative number, its first key minus its first query
in units of the tile that is walked over. Bias and window are expanded once a call into one tile for each such number, in
which a masked entry is _MASKED; all numbers whose offsets share one bias share one tile, so there are few of them at any
length. A tile is what the product of queries and keys is added to. The gradient to the keys walks over queries and is
the same problem with the signs of all offsets turned.

Exponentials and log-sum-exps are in base 2. No infinity takes part in a subtraction: a masked score is finite, and a
running maximum starts at _LOWEST, far above it and far below any other score, so that masked weights are 0 from the
first. Padding is the only row that sees no key; its log-sum-exp is set to _NOTHING, which makes every probability of
the backward pass 0.
"""

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(-1.0e30)
_LOWEST = tl.constexpr(-1.0e20)
_NOTHING = tl.constexpr(1.0e30)
_LARGEST_ID = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["max_offset", "rel_first", "gap0_at", "gap0", "gap1_at", "gap1", "left", "right"])
def bias_tiles_kernel(
    p_bias,
    p_tiles,
    num_tiles,
    max_offset,
    left,
    right,
    rel_first,
    gap0_at,
    gap0,
    gap1_at,
    gap1,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIRROR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Write tile i_tile of head i_head, (ROWS, COLUMNS): bias of column minus row, _MASKED off the window.

    MIRROR: rows are keys, columns are queries; the bias is that of row minus column, left and right come exchanged.
    """
    i_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % num_tiles
    # The inverse of _tile_number, at the first of the relative numbers that share a tile.
    i_rel = i_tile + rel_first
    i_rel += tl.where(i_rel > gap0_at, gap0, 0)
    i_rel += tl.where(i_rel > gap1_at, gap1, 0)
    o_row = tl.arange(0, ROWS)[:, None]
    o_column = tl.arange(0, COLUMNS)[None, :]
    o_offset = i_rel * COLUMNS + o_column - o_row
    if HAS_BIAS:
        o_bias = tl.minimum(tl.maximum(-o_offset if MIRROR else o_offset, -max_offset), max_offset) + max_offset
        b_tile = tl.load(p_bias + i_head * (2 * max_offset + 1) + o_bias)
    else:
        b_tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_tile = tl.where((o_offset >= -left) & (o_offset <= right), b_tile, _MASKED)
    p_tile = p_tiles + (i_head * num_tiles + i_tile) * (ROWS * COLUMNS)
    tl.store(p_tile + o_row * COLUMNS + o_column, b_tile)


@triton.jit(do_not_specialize=["L", "left", "right"])
def document_bounds_kernel(p_ids, p_first, p_end, L, left, right, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """First position and end of what the tokens of one tile of a row can see: their documents, inside the window.

    Ids do not decrease, but 0 (padding) may stand anywhere. The walk to either side ends with the document, so it costs
    a fraction of the attention that follows.
    """
    num_tiles = tl.cdiv(L, BLOCK)
    i_tile = tl.program_id(0) % num_tiles
    p_row = p_ids + (tl.program_id(0) // num_tiles).to(tl.int64) * L
    o_own = i_tile * BLOCK + tl.arange(0, BLOCK)
    b_own = tl.load(p_row + o_own, mask=o_own < L, other=0).to(tl.int32)
    b_lowest = tl.min(tl.where(b_own > 0, b_own, _LARGEST_ID))
    b_highest = tl.max(b_own)
    b_first = tl.min(tl.where(b_own > 0, o_own, L))
    b_end = tl.max(tl.where(b_own > 0, o_own + 1, 0))

    i_limit = tl.where(b_highest > 0, tl.maximum(i_tile * BLOCK - left, 0), L)
    i_position = i_tile * BLOCK
    while i_position > i_limit:
        o_walk = i_position - CHUNK + tl.arange(0, CHUNK)
        b_walk = tl.load(p_row + o_walk, mask=o_walk >= i_limit, other=0).to(tl.int32)
        b_first = tl.minimum(b_first, tl.min(tl.where(b_walk == b_lowest, o_walk, L)))
        is_past = tl.max(((b_walk > 0) & (b_walk < b_lowest)).to(tl.int32)) > 0
        i_position = tl.where(is_past, i_limit, i_position - CHUNK)

    i_limit = tl.where(b_highest > 0, tl.minimum(i_tile * BLOCK + BLOCK + right, L), 0)
    i_position = i_tile * BLOCK + BLOCK
    while i_position < i_limit:
        o_walk = i_position + tl.arange(0, CHUNK)
        b_walk = tl.load(p_row + o_walk, mask=o_walk < i_limit, other=0).to(tl.int32)
        b_end = tl.maximum(b_end, tl.max(tl.where(b_walk == b_highest, o_walk + 1, 0)))
        is_past = tl.max((b_walk > b_highest).to(tl.int32)) > 0
        i_position = tl.where(is_past, i_limit, i_position + CHUNK)

    tl.store(p_first + tl.program_id(0), b_first)
    tl.store(p_end + tl.program_id(0), b_end)


@triton.jit
def _walk_bounds(p_first, p_end, i_bounds, i_row, L, left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_SEGMENTS: tl.constexpr):  # fmt: skip
    """Start, a multiple of COLUMNS, and end of what the ROWS tokens from i_row on can see."""
    i_start = tl.maximum(i_row - left, 0)
    i_end = tl.minimum(i_row + ROWS + right, L)
    if HAS_SEGMENTS:
        i_start = tl.maximum(i_start, tl.load(p_first + i_bounds))
        i_end = tl.minimum(i_end, tl.load(p_end + i_bounds))
    return i_start // COLUMNS * COLUMNS, i_end


@triton.jit
def _tile_number(i_rel, rel_first, gap0_at, gap0, gap1_at, gap1):
    """Which tile serves relative number i_rel: those in [gap_at, gap_at + gap] share one."""
    i_tile = i_rel - rel_first
    i_tile -= tl.minimum(tl.maximum(i_rel - gap0_at, 0), gap0)
    i_tile -= tl.minimum(tl.maximum(i_rel - gap1_at, 0), gap1)
    return i_tile.to(tl.int64)


@triton.jit
def _load_rows(p_x, o_x, o_row, L, IS_RAGGED: tl.constexpr, UPCAST: tl.constexpr):
    """Load a (rows, K) block; rows from L on are 0."""
    b_x = tl.load(p_x + o_x, mask=(o_row < L)[:, None], other=0.0) if IS_RAGGED else tl.load(p_x + o_x)
    return b_x.to(tl.float32) if UPCAST else b_x


@triton.jit
def _load_ids(p_ids, o_row, L, PADDING: tl.constexpr):
    """Load segment ids, PADDING in place of 0: with unlike values on the two sides, padding equals nothing."""
    b_ids = tl.load(p_ids + o_row, mask=o_row < L, other=0).to(tl.int32)
    return tl.where(b_ids > 0, b_ids, PADDING)


@triton.jit
def _mix(b_x):
    """MurmurHash3's finaliser of 32 bits: one to one, and every bit of the result depends on every bit of `b_x`."""
    b_x = (b_x ^ (b_x >> 16)) * 0x85EBCA6B
    b_x = (b_x ^ (b_x >> 13)) * 0xC2B2AE35
    return b_x ^ (b_x >> 16)


@triton.jit
def _dropout_keys(p_seed, i_sequence):
    """Draw two random words, for the queries and the keys of one head of one row of the batch."""
    b_zero = i_sequence * 0
    b_query_key, b_key_key, _, _ = tl.philox(tl.load(p_seed), i_sequence, b_zero, b_zero, b_zero)
    return b_query_key, b_key_key


@triton.jit
def _is_kept(b_query_words, b_key_words, drop_below):
    """Whether dropout keeps a weight: a pure function of seed, head, query and key, at any tile size.

    Philox for each weight would cost some hundred instructions, ten times the softmax; here it draws a key for each
    head only, and each weight mixes the word of its query with that of its key.
    """
    return (_mix(b_query_words ^ b_key_words) >> 1).to(tl.int32) >= drop_below


@triton.jit(do_not_specialize=["L", "left", "right", "rel_first", "gap0_at", "gap0", "gap1_at", "gap1", "drop_below"])
def local_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_tiles,
    p_ids,
    p_first,
    p_end,
    p_seed,
    p_o,
    p_lse,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_tiles,
    L,
    H,
    left,
    right,
    rel_first,
    gap0_at,
    gap0,
    gap1_at,
    gap1,
    keep_scale,
    drop_below,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """O and its log-sum-exp for BLOCK_M queries of one head: walks over their keys with a running softmax."""
    num_tiles = tl.cdiv(L, BLOCK_M)
    i_tile = tl.program_id(0) % num_tiles
    i_sequence = tl.program_id(0) // num_tiles
    i_batch, i_head = (i_sequence // H).to(tl.int64), (i_sequence % H).to(tl.int64)
    i_m = i_tile * BLOCK_M
    o_k = tl.arange(0, K)
    o_n = tl.arange(0, BLOCK_N)
    o_query = i_m + tl.arange(0, BLOCK_M)
    o_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + o_n[None, :]

    p_q += i_batch * stride_qb + i_head * stride_qh + tl.cast(i_m, tl.int64) * stride_ql
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    p_tiles += i_head * stride_tiles
    o_q = tl.arange(0, BLOCK_M)[:, None] * stride_ql + o_k[None, :]
    o_kn = o_n[:, None] * stride_kl + o_k[None, :]
    o_vn = o_n[:, None] * stride_vl + o_k[None, :]
    b_q = _load_rows(p_q, o_q, o_query, L, IS_RAGGED, UPCAST)
    if HAS_SEGMENTS:
        p_ids += i_batch * L
        b_query_ids = _load_ids(p_ids, o_query, L, -1)
    if DROPOUT:
        b_query_key, b_key_key = _dropout_keys(p_seed, i_sequence)
        b_query_words = _mix(o_query.to(tl.uint32) ^ b_query_key)[:, None]

    b_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, K], tl.float32)
    i_start, i_end = _walk_bounds(
        p_first, p_end, i_batch * num_tiles + i_tile, i_m, L, left, right, BLOCK_M, BLOCK_N, HAS_SEGMENTS
    )
    for i_n in range(i_start, i_end, BLOCK_N):
        o_key = i_n + o_n
        b_k = _load_rows(p_k + tl.cast(i_n, tl.int64) * stride_kl, o_kn, o_key, L, IS_RAGGED, UPCAST)
        i_number = _tile_number((i_n - i_m) // BLOCK_N, rel_first, gap0_at, gap0, gap1_at, gap1)
        b_bias = tl.load(p_tiles + i_number * (BLOCK_M * BLOCK_N) + o_tile)
        b_s = tl.dot(b_q, tl.trans(b_k), b_bias, input_precision="ieee")
        if HAS_SEGMENTS:
            b_key_ids = _load_ids(p_ids, o_key, L, 0)
            b_s = tl.where(b_query_ids[:, None] == b_key_ids[None, :], b_s, _MASKED)
        elif IS_RAGGED:
            b_s = tl.where((o_key < L)[None, :], b_s, _MASKED)

        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1) * _LOG2E)
        b_shrink = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_s * _LOG2E - b_new_max[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_max = b_new_max
        if DROPOUT:
            b_key_words = _mix(o_key.to(tl.uint32) ^ b_key_key)[None, :]
            b_p = tl.where(_is_kept(b_query_words, b_key_words, drop_below), b_p, 0.0)
        b_v = _load_rows(p_v + tl.cast(i_n, tl.int64) * stride_vl, o_vn, o_key, L, IS_RAGGED, UPCAST)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision="ieee")

    sees_keys = b_sum > 0.0
    b_sum = tl.where(sees_keys, b_sum, 1.0)
    b_lse = tl.where(sees_keys, b_max + tl.log2(b_sum), _NOTHING)
    b_scale = 1.0 / b_sum
    if DROPOUT:
        b_scale *= keep_scale
    b_o *= b_scale[:, None]
    p_o += (i_batch * L + i_m) * (H * K) + i_head * K
    o_o = tl.arange(0, BLOCK_M)[:, None] * (H * K) + o_k[None, :]
    tl.store(p_o + o_o, b_o.to(p_o.dtype.element_ty), mask=(o_query < L)[:, None])
    tl.store(p_lse + i_sequence.to(tl.int64) * L + o_query, b_lse, mask=o_query < L)


@triton.jit(
    do_not_specialize=[
        "L",
        "left",
        "right",
        "rel_first",
        "gap0_at",
        "gap0",
        "gap1_at",
        "gap1",
        "near_first",
        "near_last",
        "num_near",
        "drop_below",
    ]
)
def local_attention_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_lse,
    p_tiles,
    p_ids,
    p_first,
    p_end,
    p_seed,
    p_dq,
    p_delta,
    p_near,
    p_far,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    stride_tiles,
    L,
    H,
    left,
    right,
    rel_first,
    gap0_at,
    gap0,
    gap1_at,
    gap1,
    near_first,
    near_last,
    num_near,
    keep_scale,
    drop_below,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    BANDS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradient to BLOCK_M queries, delta = rowsum(dO * O) for the other kernel, and this tile's share of the bias's.

    The bias gradient needs the sums of dS along diagonals; tiles whose offsets all have the first or the last bias are
    only summed. There are two ways.

    BANDS > 0, for few offsets in half precision: a tile is an 8 x 8 array of 8 x 8 blocks, and blocks of equal block
    offset can be added whole. With dS laid out as (block, place in the block) that is a product with a matrix of ones
    and zeros, for tensor cores, which adds over the whole walk. A second such product at the end adds the diagonals of
    the blocks: entry (band, u) of the result is for offset 8 band + u less a constant.

    BANDS = 0: row m of a tile is rotated by m, which makes diagonals columns: column c then holds offset c of the rows
    above the wrap and offset c - BLOCK_N below it. The latter belongs to the columns of the tile to the left, so
    neighbouring tiles add up to one vector over offsets, of which BLOCK_N entries are finished, and written, with every
    tile. This takes twice the instructions of all the rest.
    """
    num_tiles = tl.cdiv(L, BLOCK_M)
    i_tile = tl.program_id(0) % num_tiles
    i_sequence = tl.program_id(0) // num_tiles
    i_batch, i_head = (i_sequence // H).to(tl.int64), (i_sequence % H).to(tl.int64)
    i_m = i_tile * BLOCK_M
    o_k = tl.arange(0, K)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_query = i_m + o_m
    o_tile = o_m[:, None] * BLOCK_N + o_n[None, :]

    p_q += i_batch * stride_qb + i_head * stride_qh + tl.cast(i_m, tl.int64) * stride_ql
    p_do += i_batch * stride_dob + i_head * stride_doh + tl.cast(i_m, tl.int64) * stride_dol
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    p_tiles += i_head * stride_tiles
    p_lse += i_sequence.to(tl.int64) * L
    p_delta += i_sequence.to(tl.int64) * L
    i_out = (i_batch * L + i_m) * (H * K) + i_head * K
    o_out = o_m[:, None] * (H * K) + o_k[None, :]
    o_kn = o_n[:, None] * stride_kl + o_k[None, :]
    o_vn = o_n[:, None] * stride_vl + o_k[None, :]
    b_do = _load_rows(p_do, o_m[:, None] * stride_dol + o_k[None, :], o_query, L, IS_RAGGED, UPCAST)
    b_o = _load_rows(p_o + i_out, o_out, o_query, L, IS_RAGGED, UPCAST)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    tl.store(p_delta + o_query, b_delta, mask=o_query < L)
    b_q = _load_rows(p_q, o_m[:, None] * stride_ql + o_k[None, :], o_query, L, IS_RAGGED, UPCAST)
    b_lse = tl.load(p_lse + o_query, mask=o_query < L, other=_NOTHING)
    if HAS_SEGMENTS:
        p_ids += i_batch * L
        b_query_ids = _load_ids(p_ids, o_query, L, -1)
    if DROPOUT:
        b_query_key, b_key_key = _dropout_keys(p_seed, i_sequence)
        b_query_words = _mix(o_query.to(tl.uint32) ^ b_query_key)[:, None]
    if BIAS_GRADIENT:
        i_program = i_sequence.to(tl.int64) * num_tiles + i_tile
        if BANDS > 0:
            b_bands = tl.zeros([BANDS, 64], tl.float32)
            o_block = tl.arange(0, BLOCK_M * BLOCK_N // 64)
            o_band = o_block % (BLOCK_N // 8) - o_block // (BLOCK_N // 8) + (BLOCK_M // 8 - 1)
        else:
            tl.static_assert(BLOCK_M == BLOCK_N)
            p_near += i_program * num_near
            b_open = tl.zeros([BLOCK_N], tl.float32)
        b_before = tl.zeros([BLOCK_M], tl.float32)
        b_after = tl.zeros([BLOCK_M], tl.float32)

    b_dq = tl.zeros([BLOCK_M, K], tl.float32)
    i_start, i_end = _walk_bounds(
        p_first, p_end, i_batch * num_tiles + i_tile, i_m, L, left, right, BLOCK_M, BLOCK_N, HAS_SEGMENTS
    )
    for i_n in range(i_start, i_end, BLOCK_N):
        o_key = i_n + o_n
        i_rel = (i_n - i_m) // BLOCK_N
        b_k = _load_rows(p_k + tl.cast(i_n, tl.int64) * stride_kl, o_kn, o_key, L, IS_RAGGED, UPCAST)
        b_v = _load_rows(p_v + tl.cast(i_n, tl.int64) * stride_vl, o_vn, o_key, L, IS_RAGGED, UPCAST)
        i_number = _tile_number(i_rel, rel_first, gap0_at, gap0, gap1_at, gap1)
        b_bias = tl.load(p_tiles + i_number * (BLOCK_M * BLOCK_N) + o_tile)
        b_s = tl.dot(b_q, tl.trans(b_k), b_bias, input_precision="ieee")
        # Masked after the exponential, so that scale and shift stay one instruction.
        b_p = tl.exp2(b_s * _LOG2E - b_lse[:, None])
        if HAS_SEGMENTS:
            b_key_ids = _load_ids(p_ids, o_key, L, 0)
            b_p = tl.where(b_query_ids[:, None] == b_key_ids[None, :], b_p, 0.0)
        elif IS_RAGGED:
            b_p = tl.where((o_key < L)[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        if DROPOUT:
            b_key_words = _mix(o_key.to(tl.uint32) ^ b_key_key)[None, :]
            b_dp = tl.where(_is_kept(b_query_words, b_key_words, drop_below), b_dp * keep_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
        if BIAS_GRADIENT:
            if (i_rel >= near_first) & (i_rel <= near_last):
                if BANDS > 0:
                    b_blocks = tl.reshape(b_ds.to(b_k.dtype), (BLOCK_M // 8, 8, BLOCK_N // 8, 8))
                    b_blocks = tl.reshape(tl.permute(b_blocks, (0, 2, 1, 3)), (BLOCK_M * BLOCK_N // 64, 64))
                    o_target = o_band + (i_rel - near_first) * (BLOCK_N // 8)
                    b_ones = (tl.arange(0, BANDS)[:, None] == o_target[None, :]).to(b_k.dtype)
                    b_bands = tl.dot(b_ones, b_blocks, b_bands)
                else:
                    # i_n // L is 0: without a part that changes from tile to tile, the compiler keeps all these indices in
                    # registers through the loop, and spills.
                    o_diagonal = o_m[:, None] + o_n[None, :] + i_n // L
                    is_wrapped = o_diagonal >= BLOCK_N
                    b_diagonals = tl.gather(b_ds, o_diagonal % BLOCK_N, axis=1)
                    b_open += tl.sum(tl.where(is_wrapped, b_diagonals, 0.0), axis=0)
                    tl.store(p_near + (i_rel - near_first) * BLOCK_N + o_n, b_open)
                    b_open = tl.sum(tl.where(is_wrapped, 0.0, b_diagonals), axis=0)
            else:
                b_rows = tl.sum(b_ds, axis=1)
                b_before += tl.where(i_rel < near_first, b_rows, 0.0)
                b_after += tl.where(i_rel < near_first, 0.0, b_rows)

    tl.store(p_dq + i_out + o_out, b_dq.to(p_dq.dtype.element_ty), mask=(o_query < L)[:, None])
    if BIAS_GRADIENT:
        if BANDS > 0:
            # Two terms of half precision hold 16 bits of a sum and more; an eighth, as float16 may end at eight summands.
            o_place = tl.arange(0, 64)
            o_u = tl.arange(0, 16)
            b_ones = ((o_place % 8 - o_place // 8 + 7)[:, None] == o_u[None, :]).to(b_q.dtype)
            b_bands *= 0.125
            b_high = b_bands.to(b_q.dtype)
            b_low = (b_bands - b_high.to(tl.float32)).to(b_q.dtype)
            b_offsets = tl.dot(b_low, b_ones, tl.dot(b_high, b_ones)) * 8.0
            o_offset = tl.arange(0, BANDS)[:, None] * 16 + o_u[None, :]
            tl.store(p_near + i_program * num_near + o_offset, b_offsets, mask=o_offset < num_near)
        else:
            if i_start < i_end:
                i_last = tl.minimum((i_end - 1) // BLOCK_N - i_tile, near_last)
                tl.store(p_near + (i_last - near_first + 1) * BLOCK_N + o_n, b_open)
        tl.store(p_far + i_program * 2, tl.sum(b_before))
        tl.store(p_far + i_program * 2 + 1, tl.sum(b_after))


@triton.jit(do_not_specialize=["L", "left", "right", "rel_first", "gap0_at", "gap0", "gap1_at", "gap1", "drop_below"])
def local_attention_bwd_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_delta,
    p_tiles,
    p_ids,
    p_first,
    p_end,
    p_seed,
    p_dk,
    p_dv,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    stride_tiles,
    L,
    H,
    left,
    right,
    rel_first,
    gap0_at,
    gap0,
    gap1_at,
    gap1,
    keep_scale,
    drop_below,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradients to BLOCK_N keys and values: walks over the queries that see them, with all tiles transposed.

    `left` and `right` are what a key sees of the queries: the window's right and left. Keys past L gather what is never
    stored; queries past L and padding have a log-sum-exp of _NOTHING.
    """
    num_tiles = tl.cdiv(L, BLOCK_N)
    i_tile = tl.program_id(0) % num_tiles
    i_sequence = tl.program_id(0) // num_tiles
    i_batch, i_head = (i_sequence // H).to(tl.int64), (i_sequence % H).to(tl.int64)
    i_n = i_tile * BLOCK_N
    o_k = tl.arange(0, K)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_key = i_n + o_n
    o_tile = o_n[:, None] * BLOCK_M + o_m[None, :]

    p_q += i_batch * stride_qb + i_head * stride_qh
    p_do += i_batch * stride_dob + i_head * stride_doh
    p_k += i_batch * stride_kb + i_head * stride_kh + tl.cast(i_n, tl.int64) * stride_kl
    p_v += i_batch * stride_vb + i_head * stride_vh + tl.cast(i_n, tl.int64) * stride_vl
    p_tiles += i_head * stride_tiles
    p_lse += i_sequence.to(tl.int64) * L
    p_delta += i_sequence.to(tl.int64) * L
    o_qm = o_m[:, None] * stride_ql + o_k[None, :]
    o_dom = o_m[:, None] * stride_dol + o_k[None, :]
    b_k = _load_rows(p_k, o_n[:, None] * stride_kl + o_k[None, :], o_key, L, IS_RAGGED, UPCAST)
    b_v = _load_rows(p_v, o_n[:, None] * stride_vl + o_k[None, :], o_key, L, IS_RAGGED, UPCAST)
    if HAS_SEGMENTS:
        p_ids += i_batch * L
        b_key_ids = _load_ids(p_ids, o_key, L, -1)
    if DROPOUT:
        b_query_key, b_key_key = _dropout_keys(p_seed, i_sequence)
        b_key_words = _mix(o_key.to(tl.uint32) ^ b_key_key)[:, None]

    b_dk = tl.zeros([BLOCK_N, K], tl.float32)
    b_dv = tl.zeros([BLOCK_N, K], tl.float32)
    i_start, i_end = _walk_bounds(
        p_first, p_end, i_batch * num_tiles + i_tile, i_n, L, left, right, BLOCK_N, BLOCK_M, HAS_SEGMENTS
    )
    for i_m in range(i_start, i_end, BLOCK_M):
        o_query = i_m + o_m
        b_q = _load_rows(p_q + tl.cast(i_m, tl.int64) * stride_ql, o_qm, o_query, L, IS_RAGGED, UPCAST)
        b_do = _load_rows(p_do + tl.cast(i_m, tl.int64) * stride_dol, o_dom, o_query, L, IS_RAGGED, UPCAST)
        b_lse = tl.load(p_lse + o_query, mask=o_query < L, other=_NOTHING)
        b_delta = tl.load(p_delta + o_query, mask=o_query < L, other=0.0)
        i_number = _tile_number((i_m - i_n) // BLOCK_M, rel_first, gap0_at, gap0, gap1_at, gap1)
        b_bias = tl.load(p_tiles + i_number * (BLOCK_M * BLOCK_N) + o_tile)
        b_s = tl.dot(b_k, tl.trans(b_q), b_bias, input_precision="ieee")
        b_p = tl.exp2(b_s * _LOG2E - b_lse[None, :])
        if HAS_SEGMENTS:
            b_query_ids = _load_ids(p_ids, o_query, L, 0)
            b_p = tl.where(b_key_ids[:, None] == b_query_ids[None, :], b_p, 0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_weights = b_p
        if DROPOUT:
            b_query_words = _mix(o_query.to(tl.uint32) ^ b_query_key)[None, :]
            is_kept = _is_kept(b_query_words, b_key_words, drop_below)
            b_weights = tl.where(is_kept, b_p * keep_scale, 0.0)
            b_dp = tl.where(is_kept, b_dp * keep_scale, 0.0)
        b_dv = tl.dot(b_weights.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")

    i_out = (i_batch * L + i_n) * (H * K) + i_head * K
    o_out = o_n[:, None] * (H * K) + o_k[None, :]
    m_out = (o_key < L)[:, None]
    tl.store(p_dk + i_out + o_out, b_dk.to(p_dk.dtype.element_ty), mask=m_out)
    tl.store(p_dv + i_out + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m_out)

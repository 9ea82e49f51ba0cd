"""Local attention by Triton, as operators that torch.compile, checkpointing and autocast take as one node each.

Keeps q, k, v, o and the log-sum-exp of every query (base 2) for the backward pass; nothing grows with the square of the
length. Queries, keys and values may be views of one fused projection.

Shapes: B batch, L length, H heads, K d_kv, D the largest offset with its own bias.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spade_t5.kernels.launch import LaunchConfig, launch_config, must_upcast, operator
from spade_t5.kernels.local_attention.triton_kernels import (
    bias_tiles_kernel,
    document_bounds_kernel,
    local_attention_bwd_dkdv_kernel,
    local_attention_bwd_dq_kernel,
    local_attention_fwd_kernel,
)

HEAD_SIZES = (16, 32, 64, 128)
"""Values of d_kv that the kernels are written for: powers of two that a tensor core multiplies."""

_NARROW_TOKENS = 255
_WALK_TOKENS = 512
# Rows of the accumulator for the bias gradient by bands; offsets up to 190 or so need no more.
_LARGEST_BANDS = 64


def local_attention_triton(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(S) V with S as in `local_attention`; arguments and result as there, unchecked but for d_kv.

    Raises:
        ValueError: d_kv is not one of `HEAD_SIZES`.
    """
    d_kv = q_BLHK.shape[3]
    if d_kv not in HEAD_SIZES:
        raise ValueError(
            f"q has d_kv={d_kv}: the Triton kernels take {', '.join(map(str, HEAD_SIZES))}; choose backend 'torch'"
        )
    # On the device and from its default generator: nothing waits, and checkpointing draws the same seed again.
    seed = torch.randint(2**62, (1,), device=q_BLHK.device) if dropout_p > 0.0 else None
    return _forward(q_BLHK, k_BLHK, v_BLHK, offset_bias, left, right, segment_ids, dropout_p, seed)[0]


@operator("local_attention")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_with_adjacent_columns(x) for x in (q, k, v))
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    batch, length, num_heads, _ = q.shape
    o, lse = _empty_outputs(q)
    config = _config("fwd", q, left, right, dropout_p)
    walk = _Walk.over_keys(config, length, left, right, offset_bias)
    first, end = _document_bounds(walk, segment_ids, length)
    local_attention_fwd_kernel[triton.cdiv(length, walk.rows) * batch * num_heads,](
        p_q=q,
        p_k=k,
        p_v=v,
        p_tiles=_bias_tiles(walk, offset_bias, q.device),
        p_ids=segment_ids,
        p_first=first,
        p_end=end,
        p_seed=seed,
        p_o=o,
        p_lse=lse,
        **_strides(q=q, k=k, v=v),
        **_scalars(walk, q, offset_bias, segment_ids, dropout_p),
        **config,
    )
    return o, lse


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, _ = q.shape
    lse = torch.empty(batch, num_heads, length, dtype=torch.float32, device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@operator("local_attention_backward")
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    o: Tensor,
    lse: Tensor,
    needs_bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    do, q, k, v = (_with_adjacent_columns(x) for x in (do, q, k, v))
    segment_ids = None if segment_ids is None else segment_ids.contiguous()
    batch, length, num_heads, _ = q.shape
    dq, dk, dv, dbias = _empty_gradients(q, offset_bias, needs_bias_gradient)
    delta = torch.empty_like(lse)
    strides = _strides(q=q, k=k, v=v, do=do)

    config = _config("dq", q, left, right, dropout_p)
    walk = _Walk.over_keys(config, length, left, right, offset_bias)
    has_bands = q.dtype != torch.float32 and walk.num_bands <= _LARGEST_BANDS
    if needs_bias_gradient and not has_bands:
        # Rotation needs square tiles.
        config = config | {"BLOCK_N": config["BLOCK_M"]}
        walk = _Walk.over_keys(config, length, left, right, offset_bias)
    first, end = _document_bounds(walk, segment_ids, length)
    num_programs = triton.cdiv(length, walk.rows) * batch * num_heads
    near = far = None
    num_near = 16 * walk.num_bands if has_bands else walk.num_near_offsets
    if needs_bias_gradient:
        # Zeros: without bands a program writes the tiles that it visits.
        make = torch.empty if has_bands else torch.zeros
        near = make(num_programs, num_near, dtype=torch.float32, device=q.device)
        far = torch.empty(num_programs, 2, dtype=torch.float32, device=q.device)
    local_attention_bwd_dq_kernel[num_programs,](
        p_q=q,
        p_k=k,
        p_v=v,
        p_o=o,
        p_do=do,
        p_lse=lse,
        p_tiles=_bias_tiles(walk, offset_bias, q.device),
        p_ids=segment_ids,
        p_first=first,
        p_end=end,
        p_seed=seed,
        p_dq=dq,
        p_delta=delta,
        p_near=near,
        p_far=far,
        near_first=walk.near_first,
        near_last=walk.near_last,
        num_near=num_near,
        BIAS_GRADIENT=needs_bias_gradient,
        BANDS=_LARGEST_BANDS if has_bands else 0,
        **strides,
        **_scalars(walk, q, offset_bias, segment_ids, dropout_p),
        **config,
    )
    if near is not None and far is not None:
        dbias.copy_(_bias_gradient(walk, near, far, batch, num_heads, has_bands=has_bands))

    config = _config("dkdv", q, left, right, dropout_p)
    walk = _Walk.over_queries(config, length, left, right, offset_bias)
    first, end = _document_bounds(walk, segment_ids, length)
    local_attention_bwd_dkdv_kernel[triton.cdiv(length, walk.rows) * batch * num_heads,](
        p_q=q,
        p_k=k,
        p_v=v,
        p_do=do,
        p_lse=lse,
        p_delta=delta,
        p_tiles=_bias_tiles(walk, offset_bias, q.device),
        p_ids=segment_ids,
        p_first=first,
        p_end=end,
        p_seed=seed,
        p_dk=dk,
        p_dv=dv,
        **strides,
        **_scalars(walk, q, offset_bias, segment_ids, dropout_p),
        **config,
    )
    return dq, dk, dv, dbias


@_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, offset_bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q, offset_bias, needs_bias_gradient=others[-1])


def _empty_gradients(
    q: Tensor, offset_bias: Tensor | None, needs_bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and the bias; an operator must return tensors, so a gradient nobody needs is one of no entry."""
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    size = offset_bias.shape if offset_bias is not None and needs_bias_gradient else (0,)
    return dq, dk, dv, torch.empty(size, dtype=torch.float32, device=q.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offset_bias, ctx.left, ctx.right, segment_ids, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, offset_bias, segment_ids, seed, *output)


def _gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, offset_bias, segment_ids, seed, o, lse = ctx.saved_tensors
    needs_bias_gradient = offset_bias is not None and ctx.needs_input_grad[3]
    window = (offset_bias, ctx.left, ctx.right, segment_ids, ctx.dropout_p, seed)
    dq, dk, dv, dbias = _backward(do, q, k, v, *window, o, lse, needs_bias_gradient)
    return dq, dk, dv, dbias if needs_bias_gradient else None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class _Walk:
    """How programs of `rows` tokens walk over the others in steps of `columns`, and which bias each step meets.

    Step number rel, counted from the step at the rows' own start, meets offsets (column minus row) from
    rel columns - rows + 1 to rel columns + columns - 1. Steps inside the window with offsets beyond `max_offset` only
    share one bias tile on either side: numbers [gap_at, gap_at + gap] are served by the tile of gap_at.
    """

    rows: int
    columns: int
    left: int
    right: int
    max_offset: int
    is_mirrored: bool

    @classmethod
    def over_keys(
        cls, config: LaunchConfig, length: int, left: int | None, right: int | None, offset_bias: Tensor | None
    ) -> "_Walk":
        """Rows are queries."""
        # A row has no offset beyond L - 1: an unlimited window is a wide one.
        before, after = (length - 1 if reach is None else min(reach, length - 1) for reach in (left, right))
        max_offset = 0 if offset_bias is None else offset_bias.shape[1] // 2
        return cls(config["BLOCK_M"], config["BLOCK_N"], before, after, max_offset, is_mirrored=False)

    @classmethod
    def over_queries(
        cls, config: LaunchConfig, length: int, left: int | None, right: int | None, offset_bias: Tensor | None
    ) -> "_Walk":
        """Rows are keys, which see of the queries what the queries see of them, mirrored."""
        walk = cls.over_keys(config, length, right, left, offset_bias)
        return cls(walk.columns, walk.rows, walk.left, walk.right, walk.max_offset, is_mirrored=True)

    @property
    def rel_first(self) -> int:
        return -_ceil(self.left, self.columns)

    @property
    def _rel_last(self) -> int:
        return (self.rows - 1 + self.right) // self.columns

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(gap_at, gap) before and after the near offsets; a gap of 0 shares nothing."""
        before = (_ceil(self.rows - 1 - self.left, self.columns), self._last_far_before)
        after = (self._first_far_after, (self.right + 1) // self.columns - 1)
        (at0, to0), (at1, to1) = before, after
        return (at0, max(to0 - at0, 0)), (at1, max(to1 - at1, 0))

    @property
    def _last_far_before(self) -> int:
        """The last step whose offsets are all -D or less."""
        return (1 - self.max_offset) // self.columns - 1

    @property
    def _first_far_after(self) -> int:
        """The first step whose offsets are all D or more."""
        return _ceil(self.max_offset + self.rows - 1, self.columns)

    @property
    def num_tiles(self) -> int:
        return self._rel_last - self.rel_first + 1 - self.gaps[0][1] - self.gaps[1][1]

    @property
    def near_first(self) -> int:
        """The first step whose diagonals count one by one in the bias gradient."""
        return max(self.rel_first, self._last_far_before + 1)

    @property
    def near_last(self) -> int:
        return min(self._rel_last, self._first_far_after - 1)

    @property
    def num_near_offsets(self) -> int:
        """Offsets of the near steps, from (near_first - 1) columns on."""
        return (self.near_last - self.near_first + 2) * self.columns

    @property
    def num_bands(self) -> int:
        """Offsets of the near steps in bands of 8, from near_first columns - rows + 1 on, each 15 wide."""
        return ((self.near_last - self.near_first + 1) * self.columns + self.rows) // 8 - 1

    def scalars(self) -> dict[str, int]:
        (gap0_at, gap0), (gap1_at, gap1) = self.gaps
        return {
            "left": self.left,
            "right": self.right,
            "rel_first": self.rel_first,
            "gap0_at": gap0_at,
            "gap0": gap0,
            "gap1_at": gap1_at,
            "gap1": gap1,
        }


def _bias_tiles(walk: _Walk, offset_bias: Tensor | None, device: torch.device) -> Tensor:
    """Bias and window of every step of a walk, (H or 1, tiles, rows, columns) float32."""
    num_heads = 1 if offset_bias is None else offset_bias.shape[0]
    tiles = torch.empty(num_heads, walk.num_tiles, walk.rows, walk.columns, dtype=torch.float32, device=device)
    bias_tiles_kernel[num_heads * walk.num_tiles,](
        p_bias=None if offset_bias is None else offset_bias.contiguous(),
        p_tiles=tiles,
        num_tiles=walk.num_tiles,
        max_offset=walk.max_offset,
        **walk.scalars(),
        ROWS=walk.rows,
        COLUMNS=walk.columns,
        MIRROR=walk.is_mirrored,
        HAS_BIAS=offset_bias is not None,
        num_warps=4,
    )
    return tiles


def _document_bounds(walk: _Walk, segment_ids: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """First position and end of what each `walk.rows` tokens of a row can see, (B, tiles) int32 each."""
    if segment_ids is None:
        return None, None
    batch, num_tiles = segment_ids.shape[0], triton.cdiv(length, walk.rows)
    first, end = (torch.empty(batch, num_tiles, dtype=torch.int32, device=segment_ids.device) for _ in range(2))
    document_bounds_kernel[batch * num_tiles,](
        p_ids=segment_ids,
        p_first=first,
        p_end=end,
        L=length,
        left=walk.left,
        right=walk.right,
        BLOCK=walk.rows,
        CHUNK=_WALK_TOKENS,
        num_warps=4,
    )
    return first, end


def _bias_gradient(walk: _Walk, near: Tensor, far: Tensor, batch: int, num_heads: int, *, has_bands: bool) -> Tensor:
    """Add up what the programs found for each offset, (H, 2D + 1); torch.sum adds in a fixed order."""
    near_HO, far_HO = (x.view(batch, num_heads, -1, x.shape[1]).sum(dim=(0, 2)) for x in (near, far))
    first_offset = (walk.near_first - 1) * walk.columns
    if has_bands:
        # The second half of a band lies where the first half of the next one does.
        halves = near_HO.view(num_heads, -1, 2, 8).unbind(dim=2)
        near_HO = F.pad(halves[0].flatten(1), (0, 8)) + F.pad(halves[1].flatten(1), (8, 0))
        first_offset = walk.near_first * walk.columns - walk.rows + 1
    num_below = -walk.max_offset - first_offset
    num_above = first_offset + near_HO.shape[1] - 1 - walk.max_offset
    if walk.max_offset == 0:
        return near_HO.sum(dim=1, keepdim=True) + far_HO.sum(dim=1, keepdim=True)
    # Offsets -D and below, with those of the far steps, share the first entry; D and above the last. Where the window
    # ends inside D there are no such offsets, and no far steps.
    below = (
        near_HO[:, : num_below + 1].sum(dim=1, keepdim=True) + far_HO[:, :1]
        if num_below >= 0
        else near_HO.new_zeros(num_heads, -num_below)
    )
    above = (
        near_HO[:, near_HO.shape[1] - num_above - 1 :].sum(dim=1, keepdim=True) + far_HO[:, 1:]
        if num_above >= 0
        else near_HO.new_zeros(num_heads, -num_above)
    )
    between = near_HO[:, max(num_below + 1, 0) : near_HO.shape[1] - max(num_above + 1, 0)]
    return torch.cat([below, between, above], dim=1)


def _config(kernel: str, q: Tensor, left: int | None, right: int | None, dropout_p: float) -> LaunchConfig:
    return launch_config(
        "local_attention", config_variant(kernel, q.shape[3], q.dtype, left, right, dropout_p), q.device
    )


def config_variant(
    kernel: str, d_kv: int, dtype: torch.dtype, left: int | None, right: int | None, dropout_p: float
) -> str:
    """Name of a class of problem in the table of launch configurations."""
    if left is not None and right is not None:
        window = "narrow" if max(left, right) <= _NARROW_TOKENS else "wide"
    else:
        window = "causal" if right == 0 else "full"
    precision = "/fp32" if dtype == torch.float32 else ""
    # The forward pass has registers to spare.
    dropout = "/dropout" if dropout_p > 0.0 and kernel != "fwd" else ""
    return f"{kernel}/d{d_kv}/{window}{precision}{dropout}"


def _scalars(
    walk: _Walk, q: Tensor, offset_bias: Tensor | None, segment_ids: Tensor | None, dropout_p: float
) -> dict[str, int | float | bool]:
    _, length, num_heads, d_kv = q.shape
    return {
        "stride_tiles": 0 if offset_bias is None else walk.num_tiles * walk.rows * walk.columns,
        "L": length,
        "H": num_heads,
        **walk.scalars(),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        # Weights are kept by the comparison of 31 random bits.
        "drop_below": int(dropout_p * 2**31),
        "K": d_kv,
        "HAS_SEGMENTS": segment_ids is not None,
        "IS_RAGGED": length % max(walk.rows, walk.columns) != 0,
        "DROPOUT": dropout_p > 0.0,
        "UPCAST": must_upcast(q),
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"stride_{name}{dim}": x.stride(i) for name, x in tensors.items() for dim, i in (("b", 0), ("l", 1), ("h", 2))
    }


def _with_adjacent_columns(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)

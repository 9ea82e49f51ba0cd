"""Local attention in plain PyTorch, by blocks of queries: the path for CPUs and for devices without a kernel.

The queries of block [s, e) see the keys [s - left, e + right), which are a view: nothing is padded, unfolded or copied
three times as in LongT5's blocks (arXiv 2112.07916), and no tensor has two sides of length L. Scores live for one block
only and are computed again in the backward pass, so q, k and v are all that is saved. The loop is in Python because a
block keeps the processor busy for far longer than its few calls take; blocks of 64 queries and some hundred keys stay
in the second-level cache.

Shapes: B batch, L length, H heads, K d_kv, G = (rows of the batch taken together) x H, Q queries of a block, W keys
    they see.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_TOKENS = 64
# Scores of one step, in elements. Short rows are taken several at a time up to this size, so that a call is worth its
# overhead.
_TILE_ELEMENTS = 1 << 18


def local_attention_blocked(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    offset_bias: Tensor | None,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """O = softmax(S) V with S as in `local_attention`; arguments and result as there, unchecked."""
    # One number from the default generator fixes all dropout masks: the backward pass draws the same ones again instead
    # of storing them.
    dropout_seed = int(torch.randint(0, 2**62, (), device="cpu").item()) if dropout_p > 0.0 else None
    window = _Window(length=q_BLHK.shape[1], left=left, right=right)
    return _BlockedAttention.apply(q_BLHK, k_BLHK, v_BLHK, offset_bias, segment_ids, window, dropout_p, dropout_seed)


@functools.lru_cache(maxsize=4096)
def num_blocked_scores(length: int, left: int | None, right: int | None) -> int:
    """Scores of one head in one row of `length` tokens: those that the window hides inside a block included."""
    blocks = _Window(length=length, left=left, right=right).blocks()
    return sum((block.end - block.start) * (block.key_end - block.key_start) for block in blocks)


@dataclass(frozen=True)
class _Block:
    """Queries [start, end) and the keys [key_start, key_end) they see."""

    start: int
    end: int
    key_start: int
    key_end: int

    @property
    def geometry(self) -> tuple[int, int, int]:
        """What the bias depends on: number of queries, number of keys, offset of the first key from the first query."""
        return self.end - self.start, self.key_end - self.key_start, self.key_start - self.start


@dataclass(frozen=True)
class _Window:
    length: int
    left: int | None
    right: int | None

    def blocks(self) -> Iterator[_Block]:
        for start in range(0, self.length, _BLOCK_TOKENS):
            end = min(start + _BLOCK_TOKENS, self.length)
            key_start = 0 if self.left is None else max(0, start - self.left)
            key_end = self.length if self.right is None else min(self.length, end + self.right)
            yield _Block(start, end, key_start, key_end)

    def rows_together(self, batch: int, num_heads: int) -> int:
        """Rows of the batch in one step."""
        keys = (
            self.length
            if self.left is None or self.right is None
            else min(self.length, _BLOCK_TOKENS + self.left + self.right)
        )
        return min(batch, max(1, _TILE_ELEMENTS // (num_heads * min(self.length, _BLOCK_TOKENS) * keys)))


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        offset_bias: Tensor | None,
        segment_ids: Tensor | None,
        window: _Window,
        dropout_p: float,
        dropout_seed: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q_BLHK, k_BLHK, v_BLHK, offset_bias, segment_ids)
        ctx.window, ctx.dropout_p, ctx.dropout_seed = window, dropout_p, dropout_seed
        o_BLHK = torch.empty_like(q_BLHK, memory_format=torch.contiguous_format)
        with torch.autocast(q_BLHK.device.type, enabled=False):
            scores = _Scores(q_BLHK, offset_bias, segment_ids, window)
            dropout = _Dropout(dropout_p, dropout_seed, q_BLHK.device)
            for rows in scores.row_groups():
                q_GLK, k_GLK, v_GLK = (_heads_first(x_BLHK[rows], scores.dtype) for x_BLHK in (q_BLHK, k_BLHK, v_BLHK))
                for block in window.blocks():
                    weights_GQW = dropout.apply_(scores.softmax(q_GLK, k_GLK, block, rows))
                    o_GQK = torch.bmm(weights_GQW, v_GLK[:, block.key_start : block.key_end])
                    _store(o_BLHK[rows, block.start : block.end], o_GQK)
        if segment_ids is not None:
            o_BLHK.masked_fill_((segment_ids == 0)[:, :, None, None], 0.0)
        return o_BLHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BLHK: Tensor) -> tuple[Tensor | None, ...]:
        q_BLHK, k_BLHK, v_BLHK, offset_bias, segment_ids = ctx.saved_tensors
        window: _Window = ctx.window
        dq_BLHK, dk_BLHK, dv_BLHK = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BLHK, k_BLHK, v_BLHK)
        )
        if segment_ids is not None:
            # Padding attends to padding, which keeps its rows finite; without a gradient coming in, none leaves them.
            do_BLHK = do_BLHK.masked_fill((segment_ids == 0)[:, :, None, None], 0.0)
        with torch.autocast(q_BLHK.device.type, enabled=False):
            scores = _Scores(q_BLHK, offset_bias, segment_ids, window)
            dropout = _Dropout(ctx.dropout_p, ctx.dropout_seed, q_BLHK.device)
            bias_gradient = (
                _OffsetBiasGradient(offset_bias) if offset_bias is not None and ctx.needs_input_grad[3] else None
            )
            for rows in scores.row_groups():
                q_GLK, k_GLK, v_GLK, do_GLK = (
                    _heads_first(x_BLHK[rows], scores.dtype) for x_BLHK in (q_BLHK, k_BLHK, v_BLHK, do_BLHK)
                )
                dk_GLK, dv_GLK = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k_GLK, v_GLK))
                for block in window.blocks():
                    queries, keys = slice(block.start, block.end), slice(block.key_start, block.key_end)
                    p_GQW = scores.softmax(q_GLK, k_GLK, block, rows)
                    do_GQK = do_GLK[:, queries]
                    dp_GQW = torch.bmm(do_GQK, v_GLK[:, keys].transpose(1, 2))
                    weights_GQW = dropout.apply_(p_GQW.clone(), dp_GQW) if dropout.is_on else p_GQW
                    dv_GLK[:, keys].baddbmm_(weights_GQW.transpose(1, 2), do_GQK)
                    ds_GQW = torch.ops.aten._softmax_backward_data(dp_GQW, p_GQW, -1, scores.dtype)
                    _store(dq_BLHK[rows, queries], torch.bmm(ds_GQW, k_GLK[:, keys]))
                    dk_GLK[:, keys].baddbmm_(ds_GQW.transpose(1, 2), q_GLK[:, queries])
                    if bias_gradient is not None:
                        bias_gradient.add(ds_GQW, block)
                _store(dk_BLHK[rows], dk_GLK)
                _store(dv_BLHK[rows], dv_GLK)
        doffset_bias = bias_gradient.total() if bias_gradient is not None else None
        return dq_BLHK, dk_BLHK, dv_BLHK, doffset_bias, None, None, None, None


class _Scores:
    """Scores and their softmax for one block after another; blocks of the same geometry share one tile of bias."""

    def __init__(self, q_BLHK: Tensor, offset_bias: Tensor | None, segment_ids: Tensor | None, window: _Window) -> None:
        self.batch, _, self.num_heads, _ = q_BLHK.shape
        self.device = q_BLHK.device
        self.dtype = torch.promote_types(q_BLHK.dtype, torch.float32)
        self.offset_bias = None if offset_bias is None else offset_bias.to(self.dtype)
        self.segment_ids = segment_ids
        self.window = window
        self._tile_key: tuple[int, ...] = ()
        self._tile_GQW = q_BLHK

    def row_groups(self) -> Iterator[slice]:
        rows_together = self.window.rows_together(self.batch, self.num_heads)
        for first in range(0, self.batch, rows_together):
            yield slice(first, min(first + rows_together, self.batch))

    def softmax(self, q_GLK: Tensor, k_GLK: Tensor, block: _Block, rows: slice) -> Tensor:
        """P of one block, (G, Q, W)."""
        q_GQK, k_GWK = q_GLK[:, block.start : block.end], k_GLK[:, block.key_start : block.key_end]
        scores_GQW = torch.baddbmm(self._bias(block, q_GLK.shape[0]), q_GQK, k_GWK.transpose(1, 2))
        if self.segment_ids is not None:
            query_documents = self.segment_ids[rows, block.start : block.end, None]
            key_documents = self.segment_ids[rows, None, block.key_start : block.key_end]
            is_foreign = (query_documents != key_documents)[:, None]
            scores_GQW.view(-1, self.num_heads, *scores_GQW.shape[1:]).masked_fill_(is_foreign, -torch.inf)
        return torch.softmax(scores_GQW, dim=-1)

    def _bias(self, block: _Block, groups: int) -> Tensor:
        """Bias of one block, -inf outside the window: row i of the tile is the vector over offsets, moved by i."""
        key = (*block.geometry, groups)
        if key != self._tile_key:
            num_queries, num_keys, first_key = block.geometry
            offsets = torch.arange(first_key - num_queries + 1, first_key + num_keys, device=self.device)
            bias_HO = self._bias_of(offsets)
            tile_HQW = bias_HO.unfold(1, num_keys, 1).flip(1)
            self._tile_GQW = tile_HQW.repeat(groups // tile_HQW.shape[0], 1, 1)
            self._tile_key = key
        return self._tile_GQW

    def _bias_of(self, offsets: Tensor) -> Tensor:
        if self.offset_bias is None:
            bias_HO = torch.zeros(1, len(offsets), dtype=self.dtype, device=self.device)
        else:
            max_offset = self.offset_bias.shape[1] // 2
            bias_HO = self.offset_bias[:, offsets.clamp(-max_offset, max_offset) + max_offset]
        if self.window.left is not None:
            bias_HO = bias_HO.masked_fill(offsets < -self.window.left, -torch.inf)
        if self.window.right is not None:
            bias_HO = bias_HO.masked_fill(offsets > self.window.right, -torch.inf)
        return bias_HO


class _Dropout:
    """Dropout masks that come out the same whenever the blocks are visited in the same order with the same seed."""

    def __init__(self, p: float, seed: int | None, device: torch.device) -> None:
        self.keep_probability = 1.0 - p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    @property
    def is_on(self) -> bool:
        return self.generator is not None

    def apply_(self, x: Tensor, *others: Tensor) -> Tensor:
        """Draw one mask, multiply `x` and the `others` by it in place, return `x`."""
        if self.generator is not None:
            factor = (
                torch.empty_like(x)
                .bernoulli_(self.keep_probability, generator=self.generator)
                .div_(self.keep_probability)
            )
            for tensor in (x, *others):
                tensor.mul_(factor)
        return x


class _OffsetBiasGradient:
    """Sum of dS over all pairs of equal offset.

    Blocks of equal geometry are added elementwise, and diagonals are summed once per run of such blocks, each in a
    fixed order: no scatter with repeated indices, so the result is the same on every run.
    """

    def __init__(self, offset_bias: Tensor) -> None:
        self.total_HO = torch.zeros_like(offset_bias, dtype=torch.promote_types(offset_bias.dtype, torch.float32))
        self.geometry: tuple[int, int, int] | None = None
        self.sum_HQW = self.total_HO
        self.dtype = offset_bias.dtype

    def add(self, ds_GQW: Tensor, block: _Block) -> None:
        ds_HQW = ds_GQW.view(-1, self.total_HO.shape[0], *ds_GQW.shape[1:])
        if block.geometry == self.geometry:
            for ds in ds_HQW:
                self.sum_HQW.add_(ds)
            return
        self._fold()
        self.geometry = block.geometry
        self.sum_HQW = ds_HQW.sum(dim=0)

    def total(self) -> Tensor:
        self._fold()
        return self.total_HO.to(self.dtype)

    def _fold(self) -> None:
        """Add the diagonals of the running sum to the total."""
        if self.geometry is None:
            return
        num_queries, num_keys, first_key = self.geometry
        num_offsets = num_queries + num_keys - 1
        # Reversed rows, each one element further right than the row above: a diagonal becomes a column.
        skewed = F.pad(self.sum_HQW.flip(1), (0, num_queries)).flatten(1)[:, : num_queries * num_offsets]
        by_offset_HO = skewed.view(-1, num_queries, num_offsets).sum(dim=1)

        first_offset = first_key - num_queries + 1
        max_offset = self.total_HO.shape[1] // 2
        num_below = min(max(-max_offset - first_offset, 0), num_offsets)
        num_above = min(max(first_offset + num_offsets - 1 - max_offset, 0), num_offsets)
        inside_HO = by_offset_HO[:, num_below : num_offsets - num_above]
        first_inside = first_offset + num_below + max_offset
        self.total_HO[:, first_inside : first_inside + inside_HO.shape[1]] += inside_HO
        self.total_HO[:, 0] += by_offset_HO[:, :num_below].sum(dim=1)
        self.total_HO[:, -1] += by_offset_HO[:, num_offsets - num_above :].sum(dim=1)
        self.geometry = None


def _heads_first(x_BLHK: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H, K) as (B H, L, K): a view for a single row in `dtype`, a copy otherwise."""
    return x_BLHK.to(dtype).transpose(1, 2).flatten(0, 1)


def _store(out_BLHK: Tensor, x_GLK: Tensor) -> None:
    out_BLHK.copy_(x_GLK.view(out_BLHK.shape[0], -1, *x_GLK.shape[1:]).transpose(1, 2))

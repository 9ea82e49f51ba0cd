"""Local attention: a window on either side, full and causal attention with a relative bias, rows packed or not.

Peers get their bias ready in the form they need, as the layers of a T5 share one: LongT5 and SDPA a dense one, FlexAttention the
vector over offsets. LongT5's own module runs with its projections replaced by the given tensors. No implementation divides by sqrt(d).

Shapes: B batch, L length, H heads, K d_kv, D largest offset with a bias of its own, N blocks, Q block length, W three blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_t5.benchmarks.kernels.cases import (
    OURS,
    Benchmark,
    Case,
    Check,
    Plan,
    Work,
    Workload,
    document_ids,
    doubled,
    leaf,
    plan_for,
    random_tensors,
)
from spade_t5.kernels.local_attention import local_attention

_MAX_DISTANCE = 128
"""From this offset on T5's buckets are all the same."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    rows: int
    length: int
    num_heads: int
    d_kv: int
    left: int | None
    right: int | None
    max_offset: int
    document_tokens: int | None

    @property
    def block(self) -> int:
        """Block length of the peers that compute by blocks of one window and its two neighbours."""
        assert self.left is not None
        return self.left + 1

    def visible_pairs(self) -> int:
        """Pairs of query and key that the result depends on, in all rows of one head."""
        length = self.length if self.document_tokens is None else self.document_tokens
        i = torch.arange(length)
        first = torch.zeros_like(i) if self.left is None else (i - self.left).clamp(min=0)
        last = torch.full_like(i, length - 1) if self.right is None else (i + self.right).clamp(max=length - 1)
        return self.rows * (self.length // length) * int((last - first + 1).sum())

    def work(self, itemsize: int) -> Work:
        """Two products a visible pair forward and five backward; q, k, v, o and their gradients pass once."""
        product = 2.0 * self.d_kv * self.num_heads * self.visible_pairs()
        tensor = itemsize * self.rows * self.length * self.num_heads * self.d_kv
        return Work(
            forward_flops=2 * product, backward_flops=5 * product, forward_bytes=4 * tensor, backward_bytes=8 * tensor
        )


def cases(plan: Plan) -> Iterator[Case]:
    """A window at every length, unpacked and packed; then full and causal attention."""
    sizes: dict[str, Any] = {"num_heads": plan.num_heads, "d_kv": plan.d_kv}
    window = {"left": plan.radius, "right": plan.radius, "max_offset": plan.radius}
    for length in plan.lengths:
        for document_tokens in (None, plan.document_tokens):
            shape = _Shape(
                rows=plan.tokens // length, length=length, document_tokens=document_tokens, **sizes, **window
            )
            group = f"window {plan.radius}" + ("" if document_tokens is None else ", packed")
            yield _case(plan, shape, group)
    rows = plan.tokens // plan.full_length
    for name, right in (("full", None), ("causal", 0)):
        shape = _Shape(
            rows=rows,
            length=plan.full_length,
            left=None,
            right=right,
            max_offset=_MAX_DISTANCE,
            document_tokens=None,
            **sizes,
        )
        yield _case(plan, shape, name)


def checks(plan: Plan) -> Iterator[Check]:
    """Each kind of window, with documents whose edges fall anywhere."""
    sizes: dict[str, Any] = {"num_heads": 2, "d_kv": plan.d_kv, "rows": 2, "length": plan.check_length}
    for name, left, right in (("window", 20, 20), ("full", None, None), ("causal", None, 0)):
        for document_tokens in (None, 37):
            shape = _Shape(left=left, right=right, max_offset=24, document_tokens=document_tokens, **sizes)
            yield Check(
                name=name + ("" if document_tokens is None else ", packed"),
                ours=partial(_ours, plan, shape),
                exact=partial(_exact, plan, shape),
            )


def tuning_workloads() -> dict[str, Callable[[], Workload]]:
    """Every head size, class of window and width of the inputs that the launch table knows."""
    plan = plan_for("cuda", is_quick=False)
    windows = {"narrow": (127, 127), "wide": (511, 511), "causal": (None, 0), "full": (None, None)}
    found: dict[str, Callable[[], Workload]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for d_kv in (64, 128, 32, 16):
            for name, (left, right) in windows.items():
                shape = _Shape(
                    rows=plan.tokens // 4096 if name in ("narrow", "wide") else plan.tokens // 512,
                    length=4096 if name in ("narrow", "wide") else 512,
                    num_heads=plan.num_heads,
                    d_kv=d_kv,
                    left=left,
                    right=right,
                    max_offset=_MAX_DISTANCE,
                    document_tokens=None,
                )
                found[f"{name}/d{d_kv}/{dtype}"] = partial(_ours, plan, shape, dtype=dtype)
    return found


def _case(plan: Plan, shape: _Shape, group: str) -> Case:
    contenders: dict[str, Callable[[], Workload]] = {OURS: partial(_ours, plan, shape)}
    is_window = shape.right not in (None, 0)
    is_packed = shape.document_tokens is not None
    if is_window and not is_packed:
        contenders["longt5"] = partial(_longt5, plan, shape)
        contenders["sdpa-blocks"] = partial(_sdpa_blocks, plan, shape)
    if not is_window:
        contenders["sdpa-dense"] = partial(_sdpa_dense, plan, shape)
    if plan.device == "cuda":
        is_first = shape.length == plan.lengths[0]
        if is_first or not is_window or not is_packed:
            contenders["flex"] = partial(_flex, plan, shape, trains_bias=True)
        if is_first and not is_packed:
            contenders["flex-frozen-bias"] = partial(_flex, plan, shape, trains_bias=False)
            contenders["longt5-compiled"] = partial(_longt5, plan, shape, is_compiled=True)
    return Case(
        name=f"{group}, length {shape.length}",
        group=group,
        length=shape.length,
        work=shape.work(plan.dtype.itemsize),
        contenders=contenders,
        compiled=("flex", "flex-frozen-bias", "longt5-compiled"),
        shape={name: getattr(shape, name) for name in shape.__dataclass_fields__},
    )


def _inputs(plan: Plan, shape: _Shape) -> tuple[Tensor, ...]:
    """Leaves q, k, v, the bias, and the gradient of o; queries are scaled so that scores have unit variance."""
    size = (shape.rows, shape.length, shape.num_heads, shape.d_kv)
    q, k, v, do = random_tensors(plan, size, size, size, size)
    q = q * shape.d_kv**-0.5
    (bias,) = random_tensors(plan, (shape.num_heads, 2 * shape.max_offset + 1), seed=1, dtype=torch.float32)
    return leaf(q), leaf(k), leaf(v), leaf(bias), do


def _segments(plan: Plan, shape: _Shape) -> Tensor | None:
    if shape.document_tokens is None:
        return None
    return document_ids(shape.rows, shape.length, shape.document_tokens, plan.device)


def _ours(plan: Plan, shape: _Shape, dtype: torch.dtype | None = None) -> Workload:
    q, k, v, bias, do = _inputs(plan, shape)
    if dtype is not None:
        q, k, v, do = (leaf(x.to(dtype)) for x in (q, k, v, do))
    return _attention(shape, (q, k, v, bias), do, _segments(plan, shape), "auto")


def _exact(plan: Plan, shape: _Shape) -> Workload:
    *leaves, do = _inputs(plan, shape)
    return _attention(shape, doubled(*leaves), do.double(), _segments(plan, shape), "naive")


def _attention(
    shape: _Shape, leaves: tuple[Tensor, ...], do: Tensor, segment_ids: Tensor | None, backend: str
) -> Workload:
    def forward() -> Tensor:
        return local_attention(*leaves, left=shape.left, right=shape.right, segment_ids=segment_ids, backend=backend)

    return Workload(forward=forward, leaves=leaves, gradients=(do,))


class _Given(nn.Module):
    """Stands in for a projection whose result is there already."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.result


def _longt5(plan: Plan, shape: _Shape, *, is_compiled: bool = False) -> Workload:
    """Hugging Face's LongT5: keys and values of three blocks concatenated for every block of queries."""
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5LocalAttention, _get_local_attention_mask

    q, k, v, bias, do = _inputs(plan, shape)
    config = LongT5Config(
        d_model=shape.num_heads * shape.d_kv,
        d_kv=shape.d_kv,
        num_heads=shape.num_heads,
        local_radius=shape.block - 1,
        dropout_rate=0.0,
    )
    attention: Any = LongT5LocalAttention(config)
    attention.q, attention.k, attention.v, attention.o = _Given(q), _Given(k), _Given(v), nn.Identity()
    ones = torch.ones(1, shape.length, dtype=torch.long, device=plan.device)
    mask = _get_local_attention_mask(ones, shape.block, ones.device)
    position_bias = leaf(_bias_tile(bias, shape) + torch.where(mask, 0.0, -1e10).transpose(1, 2))
    hidden_states = q.detach().flatten(2)

    def forward() -> Tensor:
        return attention(hidden_states, position_bias=position_bias)[0].view(q.shape)

    run = torch.compile(forward, dynamic=False) if is_compiled else forward
    return Workload(forward=run, leaves=(q, k, v, position_bias), gradients=(do,))


def _bias_tile(bias_HO: Tensor, shape: _Shape) -> Tensor:
    """(H, Q, W): the bias of three blocks of keys for the queries of the middle one."""
    block = shape.block
    offsets_QW = torch.arange(-block, 2 * block, device=bias_HO.device) - torch.arange(
        block, device=bias_HO.device
    ).unsqueeze(1)
    return bias_HO.detach()[:, offsets_QW.clamp(-shape.max_offset, shape.max_offset) + shape.max_offset]


def _sdpa_blocks(plan: Plan, shape: _Shape) -> Workload:
    """PyTorch's fused attention on blocks of queries and views of three blocks of keys, with a dense bias."""
    q, k, v, bias, do = _inputs(plan, shape)
    block, length = shape.block, shape.length
    num_blocks = -(-length // block)
    first = torch.arange(num_blocks, device=plan.device) * block
    query = first[:, None, None] + torch.arange(block, device=plan.device)[:, None]
    key = first[:, None, None] + torch.arange(-block, 2 * block, device=plan.device)
    is_visible = ((key - query).abs() < block) & (key >= 0) & (key < length)
    bias_NHQW = torch.where(is_visible[:, None], _bias_tile(bias, shape), float("-inf")).to(plan.dtype)
    bias_NHQW = leaf(bias_NHQW)

    def forward() -> Tensor:
        tail = num_blocks * block - length
        q_BNHQK = F.pad(q, (0, 0, 0, 0, 0, tail)).unflatten(1, (num_blocks, block)).transpose(2, 3)
        k_BNHWK, v_BNHWK = (
            F.pad(x, (0, 0, 0, 0, block, block + tail)).unfold(1, 3 * block, block).transpose(3, 4) for x in (k, v)
        )
        bias = bias_NHQW.expand(shape.rows, *bias_NHQW.shape).flatten(0, 1)
        o = F.scaled_dot_product_attention(
            q_BNHQK.flatten(0, 1), k_BNHWK.flatten(0, 1), v_BNHWK.flatten(0, 1), attn_mask=bias, scale=1.0
        )
        return o.unflatten(0, (shape.rows, num_blocks)).transpose(2, 3).flatten(1, 2)[:, :length]

    return Workload(forward=forward, leaves=(q, k, v, bias_NHQW), gradients=(do,))


def _sdpa_dense(plan: Plan, shape: _Shape) -> Workload:
    """PyTorch's fused attention with a bias of (1, H, L, L)."""
    q, k, v, bias, do = _inputs(plan, shape)
    positions = torch.arange(shape.length, device=plan.device)
    offsets_LL = positions - positions[:, None]
    bias_HLL = bias.detach()[:, offsets_LL.clamp(-shape.max_offset, shape.max_offset) + shape.max_offset]
    if shape.right == 0:
        bias_HLL = bias_HLL.masked_fill(offsets_LL > 0, float("-inf"))
    bias_1HLL = leaf(bias_HLL[None].to(plan.dtype))

    def forward() -> Tensor:
        bias_BHLL = bias_1HLL.expand(shape.rows, -1, -1, -1)
        o_BHLK = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias_BHLL, scale=1.0
        )
        return o_BHLK.transpose(1, 2)

    return Workload(forward=forward, leaves=(q, k, v, bias_1HLL), gradients=(do,))


def _flex(plan: Plan, shape: _Shape, *, trains_bias: bool, is_compiled: bool = True) -> Workload:
    """FlexAttention with the bias vector captured, and the window and documents as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, bias, do = _inputs(plan, shape)
    if not trains_bias:
        bias = bias.detach()
    left, right, max_offset = shape.left, shape.right, shape.max_offset
    segment_ids = _segments(plan, shape)
    segments = segment_ids[0] if segment_ids is not None else None  # the rows are cut alike

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        is_visible = i == i
        if left is not None:
            is_visible = is_visible & (j - i >= -left)
        if right is not None:
            is_visible = is_visible & (j - i <= right)
        if segments is not None:
            is_visible = is_visible & (segments[i] == segments[j])
        return is_visible

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, (j - i).clamp(-max_offset, max_offset) + max_offset]

    make_mask = torch.compile(create_block_mask) if is_compiled else create_block_mask
    block_mask = make_mask(mask_mod, None, None, shape.length, shape.length, device=plan.device)
    attend = torch.compile(flex_attention, dynamic=False) if is_compiled else flex_attention

    def forward() -> Tensor:
        o_BHLK = attend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod,
            block_mask=block_mask,
            scale=1.0,
        )
        return o_BHLK.transpose(1, 2)

    leaves = (q, k, v, bias) if trains_bias else (q, k, v)
    return Workload(forward=forward, leaves=leaves, gradients=(do,))


BENCHMARK = Benchmark(checks=checks, cases=cases, tuning=tuning_workloads)

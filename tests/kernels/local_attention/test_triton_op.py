"""The Triton path against the dense reference in float64: output, every gradient, and what must hold exactly."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spade_t5.kernels import launch
from spade_t5.kernels.local_attention import local_attention, triton_op
from spade_t5.testing.kernels import RELATIVE_BOUNDS, assert_near, poisoned_allocations

F64 = torch.float64
# Without a GPU the kernels are interpreted (tests/conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("o", "dq", "dk", "dv", "dbias")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(
    length: int,
    max_offset: int | None,
    *,
    batch: int = 1,
    num_heads: int = 2,
    d_kv: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor | None]:
    source = generator(seed)
    # 0.6: scores of a size that neither levels nor saturates the softmax.
    q, k, v = (0.6 * torch.randn(3, batch, length, num_heads, d_kv, generator=source, dtype=F64)).to(dtype).to(DEVICE)
    if max_offset is None:
        return [q, k, v, None]
    return [q, k, v, torch.randn(num_heads, 2 * max_offset + 1, generator=source).to(DEVICE)]


def upstream_of(q: Tensor, seed: int = 9) -> Tensor:
    return torch.randn(q.shape, generator=generator(seed), dtype=F64).to(q.device, q.dtype)


def run(tensors: list[Tensor | None], upstream: Tensor | None = None, **options: object) -> list[Tensor]:
    """Output and gradients; `upstream` comes in the dtype of q."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    upstream = upstream_of(tensors[0]) if upstream is None else upstream
    with poisoned_allocations():
        o = local_attention(*leaves, **({"backend": "triton"} | options))  # type: ignore[arg-type]
        o.backward(upstream)
    return [o.detach(), *(x.grad for x in leaves if x is not None)]


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None,
    factors: Tensor | None = None,
) -> Tensor:
    """The formula in the dtype of the inputs, as one writes it without a kernel; `factors` multiply the weights."""
    length, max_offset = q.shape[1], bias.shape[1] // 2
    positions = torch.arange(length, device=q.device)
    offsets = positions[None, :] - positions[:, None]
    is_hidden = (offsets < -(length if left is None else left)) | (offsets > (length if right is None else right))
    is_hidden = is_hidden[None, None]
    if segment_ids is not None:
        is_foreign = (segment_ids[:, :, None] != segment_ids[:, None, :]) | (segment_ids[:, :, None] == 0)
        is_hidden = is_hidden | is_foreign[:, None]
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    scores = scores + bias.to(q.dtype)[:, offsets.clamp(-max_offset, max_offset) + max_offset]
    weights = scores.masked_fill(is_hidden, torch.finfo(q.dtype).min).softmax(dim=-1).masked_fill(is_hidden, 0.0)
    return torch.einsum("bhij,bjhk->bihk", weights if factors is None else weights * factors, v)


def assert_exact(tensors: list[Tensor | None], upstream: Tensor | None = None, **options: object) -> None:
    """Compare with the float64 reference, and in low precision with what plain PyTorch makes of the same inputs."""
    upstream = upstream_of(tensors[0]) if upstream is None else upstream
    exact = run(doubled(tensors), upstream.double(), **(options | {"backend": "naive"}))
    actual = run(tensors, upstream, **options)
    dtype = tensors[0].dtype
    is_low = dtype != torch.float32
    plain = actual
    if is_low:
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = plain_attention(*leaves, **options)
        plain = [o.detach(), *torch.autograd.grad(o, leaves, upstream)]
    for name, a, e, p in zip(NAMES, actual, exact, plain, strict=False):
        assert a.dtype == (torch.float32 if name == "dbias" else dtype)
        if e.norm() < 1e-9 * max(1.0, upstream.double().norm().item()):
            # A softmax over one key, or a bias of one entry: the gradient is 0 but for rounding.
            size = math.sqrt(a.numel()) * upstream.double().abs().max().item()
            assert a.norm() <= (5e-2 if is_low else 1e-4) * size, f"{name}: {a.norm()} where 0 is right"
            continue
        assert_near(name, a, e, RELATIVE_BOUNDS[dtype])
        if is_low:
            error, theirs = ((x.double() - e).norm().item() for x in (a, p))
            assert error <= 2 * theirs + 1e-4 * e.norm().item(), f"{name}: {error:.2e} against {theirs:.2e} of PyTorch"


def packed_rows(batch: int, length: int) -> Tensor:
    """Rows with pads in front, a document, a one-token document, a document with a pad inside, and pads behind."""
    segment_ids = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        middle = length // 3 + row
        segment_ids[row, length // 9 : middle] = 1
        segment_ids[row, middle : middle + 1] = 2
        segment_ids[row, middle + 1 : length - length // 5] = 4
        segment_ids[row, (middle + length) // 2] = 0
    return segment_ids.to(DEVICE)


CASES = [
    # length, left, right, D, d_kv, dtype
    (1, 1, 1, 1, 16, torch.float32),
    (17, 3, 9, 4, 32, torch.bfloat16),
    (17, 0, 0, 2, 16, torch.float32),
    (63, 1000, 1000, 70, 16, torch.float16),
    (64, 63, 63, 63, 64, torch.bfloat16),
    (65, 0, None, 8, 16, torch.float32),
    (65, None, 0, 8, 128, torch.float16),
    (127, 70, 3, 40, 16, torch.float32),
    (127, None, None, 31, 32, torch.bfloat16),
    (200, 63, 63, 20, 16, torch.float32),
    (200, None, 0, 20, 16, torch.float32),
    (200, None, None, 33, 16, torch.float32),
    (200, 31, 31, 200, 64, torch.float16),
]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("length", "left", "right", "max_offset", "d_kv", "dtype"), CASES)
def test_equals_the_reference(
    length: int, left: int | None, right: int | None, max_offset: int, d_kv: int, dtype: torch.dtype, is_packed: bool
) -> None:
    tensors = inputs(length, max_offset, d_kv=d_kv, dtype=dtype)
    assert_exact(tensors, left=left, right=right, segment_ids=packed_rows(1, length) if is_packed else None)


@pytest.mark.parametrize(("left", "right"), [(40, 70), (None, None)])
@pytest.mark.parametrize("max_offset", [None, 0, 1, 31, 32, 33, 300])
def test_bias_narrower_and_wider_than_window_and_tiles(
    max_offset: int | None, left: int | None, right: int | None
) -> None:
    tensors = inputs(150, max_offset, num_heads=1)
    assert_exact(tensors, left=left, right=right, segment_ids=None)
    if max_offset is not None:
        frozen = [*tensors[:3], None]
        leaves = [x.detach().requires_grad_() for x in frozen[:3]]
        o = local_attention(*leaves, tensors[3], left=left, right=right, backend="triton")
        o.backward(upstream_of(tensors[0]))
        expected = run(tensors, left=left, right=right)
        assert all(torch.equal(x.grad, e) for x, e in zip(leaves, expected[1:4], strict=True))


@pytest.fixture
def gpu_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch configurations of a Hopper GPU, interpreted."""
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")


@pytest.mark.usefixtures("gpu_blocks")
@pytest.mark.parametrize(
    ("left", "right", "max_offset", "dtype"),
    [
        (127, 127, 127, torch.bfloat16),
        (300, 30, 20, torch.bfloat16),
        (None, 0, 50, torch.bfloat16),
        (None, None, 63, torch.bfloat16),
        (127, 127, 127, torch.float32),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_block_sizes_of_the_gpu(
    left: int | None, right: int | None, max_offset: int, dtype: torch.dtype, is_packed: bool
) -> None:
    tensors = inputs(330, max_offset, num_heads=1, dtype=dtype)
    assert_exact(tensors, left=left, right=right, segment_ids=packed_rows(1, 330) if is_packed else None)


def test_batches_and_heads_do_not_mix() -> None:
    tensors = inputs(70, 10, batch=3, num_heads=3)
    assert_exact(tensors, left=20, right=20, segment_ids=packed_rows(3, 70))


@pytest.mark.parametrize(("left", "right"), [(31, 31), (None, 0), (None, None)])
def test_packed_row_equals_separate_documents(left: int | None, right: int | None) -> None:
    lengths = [37, 1, 70, 1, 1, 33]
    starts = [3 + sum(lengths[:i]) for i in range(len(lengths))]
    total = sum(lengths) + 8
    tensors = inputs(total, 10)
    upstream = upstream_of(tensors[0])
    segment_ids = torch.zeros(1, total, dtype=torch.int64, device=DEVICE)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True), start=1):
        segment_ids[:, start : start + length] = number

    packed = run(tensors, upstream, left=left, right=right, segment_ids=segment_ids)

    dbias = torch.zeros_like(packed[4])
    for start, length in zip(starts, lengths, strict=True):
        part = slice(start, start + length)
        alone = [x[:, part].contiguous() for x in tensors[:3]] + [tensors[3]]
        separate = run(alone, upstream[:, part], left=left, right=right)
        for name, p, s in zip(NAMES, packed[:4], separate[:4], strict=False):
            torch.testing.assert_close(p[:, part], s, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
        dbias += separate[4]
    torch.testing.assert_close(packed[4], dbias, rtol=1e-4, atol=1e-5)
    is_padding = segment_ids[0] == 0
    assert all((x[0, is_padding] == 0).all() for x in packed[:4])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of a score that is then masked
def test_padding_is_zero_whatever_it_holds() -> None:
    """A row of padding only, pads in front, inside and behind: outputs and gradients are 0, the rest does not see them."""
    segment_ids = packed_rows(3, 80)
    segment_ids[1] = 0
    tensors = inputs(80, 4, batch=3)
    is_padding = segment_ids == 0
    first = run(tensors, left=9, right=30, segment_ids=segment_ids)
    for x in tensors[:3]:
        x[is_padding] = 1e4
    second = run(tensors, left=9, right=30, segment_ids=segment_ids)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert all((x[is_padding] == 0).all() for x in first[:4])


def test_bias_gradient_sums_to_zero() -> None:
    """Adding one number to all biases of a head changes nothing, so the gradient has no component that way."""
    for left, right in ((63, 63), (None, None)):
        dbias = run(inputs(130, 20), left=left, right=right)[4]
        assert dbias.abs().max() > 0.1
        assert dbias.sum(dim=1).abs().max() < 2e-5 * dbias.abs().sum(dim=1).max()


def test_two_runs_are_bitwise_equal() -> None:
    tensors = inputs(100, 20, dtype=torch.bfloat16)
    options = {"left": 40, "right": None, "segment_ids": packed_rows(1, 100), "dropout_p": 0.2}
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(run(tensors, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_takes_views_of_a_fused_projection_and_transposed_tensors() -> None:
    qkv = torch.randn(2, 40, 3, 2, 16, generator=generator()).to(DEVICE)
    bias = torch.randn(21, 2, generator=generator(1)).to(DEVICE).T
    expected = run([*(x.contiguous() for x in qkv.unbind(2)), bias.contiguous()], left=20, right=20)
    upstream = upstream_of(qkv[:, :, 0])
    column_major = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in qkv.unbind(2)]
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2)]
    for views in (qkv.unbind(2), column_major, head_major):
        strided = upstream.transpose(1, 2).contiguous().transpose(1, 2)
        for a, e in zip(run([*views, bias], strided, left=20, right=20), expected, strict=True):
            assert torch.equal(a, e)


def test_takes_views_as_segment_ids() -> None:
    tensors = [torch.cat([x, x.flip(1)]) if x.dim() == 4 else x for x in inputs(40, 5)]
    segment_ids = packed_rows(2, 40)
    expanded, gappy = segment_ids[:1].expand(2, -1), segment_ids.repeat_interleave(2, dim=1)[:, ::2]
    for view in (expanded, gappy, segment_ids.t().contiguous().t()):
        assert not view.is_contiguous()
        found = run(tensors, left=9, right=9, segment_ids=view)
        for a, e in zip(found, run(tensors, left=9, right=9, segment_ids=view.contiguous()), strict=True):
            assert torch.equal(a, e)


def test_half_precision_bias_gradient_at_the_end_of_float16() -> None:
    """Eight summands may go beyond the largest float16, where each of them does not."""
    q = torch.zeros(1, 64, 1, 16, dtype=torch.float16, device=DEVICE)
    own = torch.nn.functional.one_hot(torch.arange(64) % 16, 16)[None, :, None].to(q)
    # every key of seven weighs 1/7, and dS is 29,000 for a query's own key
    tensors = [q, q, 8 * own, torch.zeros(1, 7, device=DEVICE)]
    exact = run(doubled(tensors), 30000.0 * own.double(), left=3, right=3, backend="naive")
    actual = run(tensors, 30000.0 * own, left=3, right=3)
    assert exact[4].max() > 8 * 65504
    assert_near("dbias", actual[4], exact[4], bound=1e-2)


def test_saves_its_inputs_its_output_and_one_number_a_query() -> None:
    tensors = [x.requires_grad_() for x in inputs(64, 10)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o = local_attention(*tensors, left=20, right=20, backend="triton")
    known = {x.untyped_storage().data_ptr() for x in (*tensors, o)}
    others = [x for x in saved if x.untyped_storage().data_ptr() not in known]
    assert [x.shape for x in others] == [(1, 2, 64)]


def test_is_one_node_of_a_compiled_graph() -> None:
    tensors = [x.requires_grad_() for x in inputs(40, 5)]
    segment_ids = packed_rows(1, 40)
    seed = torch.tensor([5], device=DEVICE)
    for dropout_p, maybe_seed in ((0.0, None), (0.3, seed)):
        torch.library.opcheck(
            torch.ops.spade_t5.local_attention, (*tensors, 9, None, segment_ids, dropout_p, maybe_seed)
        )

    def attention(*leaves: Tensor) -> Tensor:
        return local_attention(*leaves, left=9, right=None, segment_ids=segment_ids, backend="triton")

    upstream = upstream_of(tensors[0])
    expected = run(tensors, upstream, left=9, right=None, segment_ids=segment_ids)
    o = torch.compile(attention, backend="aot_eager", fullgraph=True)(*tensors)
    gradients = torch.autograd.grad(o, tensors, upstream)
    assert all(torch.equal(a, e) for a, e in zip((o, *gradients), expected, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointing_repeats_the_forward_pass(dropout_p: float) -> None:
    tensors = [x.requires_grad_() for x in inputs(50, 5)]
    upstream = upstream_of(tensors[0])

    def attention(*leaves: Tensor) -> Tensor:
        return local_attention(*leaves, left=9, right=20, dropout_p=dropout_p, backend="triton")

    torch.manual_seed(1)
    expected = torch.autograd.grad(attention(*tensors), tensors, upstream)
    torch.manual_seed(1)
    actual = torch.autograd.grad(checkpoint(attention, *tensors, use_reentrant=False), tensors, upstream)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_autocast_does_not_reach_inside() -> None:
    tensors = inputs(50, 5)
    expected = run(tensors, left=9, right=20)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual = run(tensors, left=9, right=20)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def dropped_probabilities(q: Tensor, k: Tensor, bias: Tensor, dropout_p: float, seed: int) -> tuple[Tensor, Tensor]:
    """P * Z' as the forward pass applies it, and as the gradient to the values does: (B, H, L, L) each."""
    length = q.shape[1]
    identity = torch.eye(length, device=q.device)[None, :, None, :].expand(q.shape[0], -1, q.shape[2], -1)
    v = identity.contiguous().requires_grad_()
    torch.manual_seed(seed)
    # Values as long as the row is: column j of the output is the weight of key j.
    q, k = (torch.nn.functional.pad(x, (0, length - x.shape[3])) for x in (q, k))
    o = local_attention(q, k, v, bias, left=40, right=70, dropout_p=dropout_p, backend="triton")
    (dv,) = torch.autograd.grad(o, v, identity)
    return o.detach().permute(0, 2, 1, 3), dv.permute(0, 2, 3, 1)


def test_dropout_masks_of_all_kernels_agree_and_keep_the_expectation() -> None:
    q, k, _, bias = inputs(128, 10, batch=2)
    dropout_p = 0.25
    forward_BHLL, backward_BHLL = dropped_probabilities(q, k, bias, dropout_p, seed=0)
    torch.testing.assert_close(forward_BHLL, backward_BHLL, rtol=1e-5, atol=1e-7)
    p_BHLL, _ = dropped_probabilities(q, k, bias, 0.0, seed=0)
    is_kept_BHLL = forward_BHLL > 0
    torch.testing.assert_close(forward_BHLL, p_BHLL * is_kept_BHLL / (1.0 - dropout_p), rtol=1e-5, atol=1e-7)

    is_visible = p_BHLL > 0
    count = is_visible.sum().item()
    assert abs(is_kept_BHLL.sum().item() / count - 0.75) < 4 * math.sqrt(0.25 * 0.75 / count)
    # Masks of heads, rows of the batch, neighbouring queries and keys, and the transposed mask are unrelated.
    z_BHLL = (is_kept_BHLL.double() - 0.75) / math.sqrt(0.25 * 0.75) * is_visible
    for other in (z_BHLL.roll(1, 0), z_BHLL.roll(1, 1), z_BHLL.roll(1, 2), z_BHLL.roll(1, 3), z_BHLL.transpose(2, 3)):
        pairs = (is_visible & (other != 0)).sum().item()
        assert abs((z_BHLL * other).sum().item()) < 5 * math.sqrt(2 * pairs)
    another, _ = dropped_probabilities(q, k, bias, dropout_p, seed=1)
    assert ((another > 0) != is_kept_BHLL).sum() > 0.2 * count


def test_dropout_gradients_use_the_mask_of_the_forward_pass() -> None:
    """With the mask read off the forward pass, the gradients are those of the dense formula with that mask."""
    length, dropout_p = 128, 0.25
    q, k, v, bias = inputs(length, 10)
    dropped, _ = dropped_probabilities(q, k, bias, dropout_p, seed=0)
    p, _ = dropped_probabilities(q, k, bias, 0.0, seed=0)
    z = torch.where(p > 0, dropped / p.clamp(min=1e-30), 0.0).double()
    upstream = upstream_of(q)

    leaves = [x.double().requires_grad_() for x in (q, k, v, bias)]
    o = plain_attention(*leaves, left=40, right=70, segment_ids=None, factors=z)
    exact = [o.detach(), *torch.autograd.grad(o, leaves, upstream.double())]

    torch.manual_seed(0)
    actual = run([q, k, v, bias], upstream, left=40, right=70, dropout_p=dropout_p)
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        assert_near(name, a, e, 1e-5)


def test_refuses_what_the_kernels_do_not_compute() -> None:
    q = torch.zeros(1, 5, 2, 24, device=DEVICE)
    with pytest.raises(ValueError, match=r"q has d_kv=24: the Triton kernels take 16, 32, 64, 128; choose backend"):
        local_attention(q, q, q, None, left=1, right=1, backend="triton")
    q = torch.zeros(1, 5, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"q is float64: the Triton kernels take .*; choose backend 'torch'"):
        local_attention(*(3 * [q.double()]), None, left=1, right=1, backend="triton")
    bias = torch.zeros(2, 3, device=DEVICE, dtype=F64)
    with pytest.raises(ValueError, match=r"offset_bias is float64: the Triton kernels take"):
        local_attention(q, q, q, bias, left=1, right=1, backend="triton")


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_every_step_of_a_walk_meets_its_own_bias(rows: int, is_mirrored: bool) -> None:
    """The tile that serves a step equals bias and window at that step's offsets, whatever is shared between steps."""
    columns, length = 32, 400
    for left, right, max_offset in ((None, None, 20), (200, 0, 5), (0, 100, 0), (31, 32, 64), (399, 5, 128)):
        bias = torch.randn(1, 2 * max_offset + 1, generator=generator()).to(DEVICE)
        config = {"BLOCK_M": columns if is_mirrored else rows, "BLOCK_N": rows if is_mirrored else columns}
        over = triton_op._Walk.over_queries if is_mirrored else triton_op._Walk.over_keys
        walk = over(config, length, left, right, bias)
        tiles = triton_op._bias_tiles(walk, bias, DEVICE)[0].cpu()
        offsets_of_0 = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
        (gap0_at, gap0), (gap1_at, gap1) = walk.gaps
        for rel in range(walk.rel_first, walk._rel_last + 1):
            number = rel - walk.rel_first - min(max(rel - gap0_at, 0), gap0) - min(max(rel - gap1_at, 0), gap1)
            offsets = (-1 if is_mirrored else 1) * (offsets_of_0 + rel * columns)
            expected = bias[0].cpu()[offsets.clamp(-max_offset, max_offset) + max_offset]
            is_hidden = (offsets < -(length - 1 if left is None else left)) | (
                offsets > (length - 1 if right is None else right)
            )
            expected = expected.masked_fill(is_hidden, -1e30)
            assert torch.equal(tiles[number], expected), (left, right, max_offset, rel)


@pytest.mark.parametrize("walk_tokens", [16, 512])
@pytest.mark.parametrize(("left", "right"), [(9, 40), (None, 0), (None, None)])
def test_walk_ends_with_window_and_documents(
    left: int | None, right: int | None, walk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_op, "_WALK_TOKENS", walk_tokens)
    length = 200
    segment_ids = torch.zeros(3, length, dtype=torch.int64)
    segment_ids[0] = torch.arange(length) // 50 + 1
    segment_ids[1, 5:190] = 7
    segment_ids[2] = packed_rows(1, length)[0].cpu()
    segment_ids[:, 60:130] *= torch.rand(3, 70, generator=generator()) < 0.2
    walk = triton_op._Walk.over_keys({"BLOCK_M": 32, "BLOCK_N": 32}, length, left, right, None)
    first, end = triton_op._document_bounds(walk, segment_ids.to(DEVICE), length)
    positions = torch.arange(length)
    offsets = positions[None, :] - positions[:, None]
    is_visible = (offsets >= -walk.left) & (offsets <= walk.right)
    for row in range(3):
        ids = segment_ids[row]
        sees = is_visible & (ids[:, None] == ids[None, :]) & (ids[:, None] != 0)
        for tile in range(math.ceil(length / 32)):
            seen = sees[tile * 32 : (tile + 1) * 32].any(dim=0).nonzero()
            if len(seen) == 0:
                assert first[row, tile] >= end[row, tile]
                continue
            # Of a document that begins or ends off the window of some queries of the tile, a few positions more.
            assert max(tile * 32 - walk.left, 0) <= first[row, tile] <= seen[0]
            assert seen[-1] < end[row, tile] <= min(tile * 32 + 32 + walk.right, length)
            assert ids[first[row, tile]] == ids[seen[0]]
            assert ids[end[row, tile] - 1] == ids[seen[-1]]


def test_bias_gradient_needs_no_memory_for_far_offsets() -> None:
    near, longer = (
        triton_op._Walk.over_keys({"BLOCK_M": 64, "BLOCK_N": 64}, length, None, None, torch.zeros(1, 257))
        for length in (4096, 65536)
    )
    assert near.num_near_offsets == longer.num_near_offsets == 6 * 64
    assert near.num_tiles == longer.num_tiles


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("d_kv", [64, 128])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (511, 511), (None, 0), (None, None)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_real_sizes_on_a_gpu(left: int | None, right: int | None, d_kv: int, is_packed: bool) -> None:
    length = 2055
    tensors = inputs(length, 128, batch=2, num_heads=4, d_kv=d_kv, dtype=torch.bfloat16)
    segment_ids = packed_rows(2, length) if is_packed else None
    assert_exact(tensors, left=left, right=right, segment_ids=segment_ids)
    options = {"left": left, "right": right, "segment_ids": segment_ids}
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, **options), run(tensors, **options), strict=True))

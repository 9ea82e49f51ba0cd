"""The chunked convolution by Triton against the impulse response and against its twin, in float64."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spade_t5.kernels.ssm_conv import ChunkedSystem, chunk_tokens, chunked_system, ssm_conv_chunked
from spade_t5.testing.kernels import assert_near, poisoned_allocations

F64 = torch.float64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("y", "du", "dlocal", "dw", "dp", "dtransition")
HALF = (torch.float16, torch.bfloat16)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE, dtype)


def any_system(
    tokens: int, *, d_model: int = 2, num_states: int = 18, num_sides: int = 2, is_dense: bool = True
) -> ChunkedSystem:
    """Four unrelated matrices: nothing is right by symmetry. The number of states fills no block."""
    rows = num_sides * num_states
    transition = randn(d_model, num_states, num_states, seed=3) * 0.8 / num_states**0.5
    return ChunkedSystem(
        randn(d_model, tokens, tokens, seed=0),
        randn(d_model, rows, tokens, seed=1) / tokens**0.5,
        randn(d_model, tokens, rows, seed=2) / num_states**0.5,
        transition if is_dense else transition[:, 0] * num_states**0.5 * 0.5,
    )


def real_system(tokens: int, *, d_model: int = 2, num_states: int = 6, num_sides: int = 2) -> ChunkedSystem:
    """Powers of a contraction: what `impulse_response` holds of."""
    transition = torch.linalg.qr(randn(d_model, num_states, num_states, seed=4, dtype=F64)).Q * 0.95
    powers = [torch.eye(num_states, dtype=F64, device=DEVICE).expand(d_model, -1, -1)]
    for _ in range(tokens):
        powers.append(transition @ powers[-1])
    stacked_DXNN = torch.stack(powers, dim=1)
    inputs_DNT = (stacked_DXNN[:, :-1] @ randn(d_model, 1, num_states, 1, seed=5, dtype=F64))[..., 0].mT
    outputs_SDXN = (randn(num_sides, d_model, 1, 1, num_states, seed=6, dtype=F64) @ stacked_DXNN)[..., 0, :]
    return chunked_system(inputs_DNT, outputs_SDXN, stacked_DXNN[:, -1], randn(d_model, seed=7, dtype=F64))


def packed_rows(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random documents, many of one token; padding in front, inside and behind; one row of one document."""
    generator = torch.Generator().manual_seed(seed)
    segment_ids = torch.zeros(batch, length, dtype=torch.int64)
    for row in range(batch):
        starts = torch.rand(length, generator=generator) < (0.0, 0.05, 0.3)[row % 3]
        segment_ids[row] = starts.cumsum(0) + 1
        segment_ids[row, torch.rand(length, generator=generator) < 0.1] = 0
        segment_ids[row, : length // 9] = 0
        segment_ids[row, length - length // 10 :] = 0
    return segment_ids.to(DEVICE)


def run(
    u: Tensor,
    system: ChunkedSystem,
    segment_ids: Tensor | None,
    backend: str,
    *,
    trains: bool = True,
    scale: float = 1.0,
) -> list[Tensor]:
    u = u.detach().requires_grad_()
    system = ChunkedSystem(*(x.detach().requires_grad_(trains) for x in system))
    # A GPU's library has no deterministic product for the references without a setting of the environment.
    with poisoned_allocations() if backend == "triton" else contextlib.nullcontext():
        y = ssm_conv_chunked(u, system, segment_ids=segment_ids, backend=backend)
        y.backward(scale * randn(*u.shape, seed=9, dtype=u.dtype))
    return [y.detach(), *(x.grad for x in (u, *system) if x.grad is not None)]


def assert_all_near(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        # Gradients of the system are float32, but of factors in half precision.
        bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert_near(name, a, e, bound)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("length", "tokens", "num_sides", "is_dense", "is_packed"),
    [
        (1, 16, 2, True, False),
        (17, 32, 1, True, True),
        (63, 16, 2, False, True),
        (64, 16, 2, True, False),
        (65, 32, 1, False, False),
        (127, 32, 2, True, True),
        (200, 64, 2, False, True),
        (200, 16, 1, True, True),
    ],
)
def test_output_and_every_gradient_equal_the_twin(
    length: int, tokens: int, num_sides: int, is_dense: bool, is_packed: bool, dtype: torch.dtype
) -> None:
    system = any_system(tokens, num_sides=num_sides, is_dense=is_dense)
    u = randn(3, length, 2, seed=8, dtype=dtype)
    segment_ids = packed_rows(3, length) if is_packed else None
    actual = run(u, system, segment_ids, "triton")
    assert [x.dtype for x in actual] == [dtype, dtype, *[torch.float32] * 4]
    # The upstream gradient is rounded to the dtype in `run`, so the twin takes the rounded one.
    leaves = [u.double().requires_grad_(), *(x.double().requires_grad_() for x in system)]
    y = ssm_conv_chunked(leaves[0], ChunkedSystem(*leaves[1:]), segment_ids=segment_ids, backend="torch")
    y.backward(randn(*u.shape, seed=9, dtype=dtype).double())
    # In a row of one chunk no state reaches anything.
    assert_all_near(actual, [y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)], dtype)
    if segment_ids is not None:
        assert all((x[segment_ids == 0] == 0).all() for x in actual[:2])


@pytest.mark.parametrize("num_sides", [1, 2])
@pytest.mark.parametrize("length", [1, 200])
def test_equals_the_impulse_response(length: int, num_sides: int) -> None:
    u = randn(3, length, 2, seed=8)
    for tokens in (16, 64)[: 1 if length == 1 else 2]:
        system = real_system(tokens, num_sides=num_sides)
        in_float = ChunkedSystem(*(x.float() for x in system))
        for segment_ids in (None, packed_rows(3, length)):
            expected = run(u.double(), system, segment_ids, "naive", trains=False)
            for a, e in zip(run(u, in_float, segment_ids, "triton", trains=False)[:1], expected, strict=False):
                assert_near("y", a, e)


def test_size_of_chunks_does_not_matter() -> None:
    u, segment_ids = randn(3, 200, 2, seed=8), packed_rows(3, 200)
    results = [
        run(u, ChunkedSystem(*(x.float() for x in real_system(tokens))), segment_ids, "triton", trains=False)
        for tokens in (16, 32, 64)
    ]
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-5 * e.abs().max().item())


def test_shift_equivariance_on_zero_extended_input() -> None:
    u = torch.zeros(1, 200, 2, device=DEVICE)
    u[:, 40:100] = randn(1, 60, 2, seed=8)
    system = ChunkedSystem(*(x.float() for x in real_system(32)))
    y, shifted = (ssm_conv_chunked(x, system, backend="triton") for x in (u, u.roll(57, dims=1)))
    torch.testing.assert_close(shifted[:, 57:], y[:, :-57], rtol=0, atol=1e-5 * y.abs().max().item())


@pytest.mark.parametrize("seed", range(3))
def test_packed_equals_separate_documents(seed: int) -> None:
    u, segment_ids = randn(3, 150, 2, seed=8), packed_rows(3, 150, seed)
    system = ChunkedSystem(*(x.float() for x in real_system(16)))
    y, du = run(u, system, segment_ids, "triton", trains=False)
    upstream = randn(*u.shape, seed=9)
    for row in range(3):
        for document in segment_ids[row].unique():
            if document == 0:
                continue
            tokens = (segment_ids[row] == document).nonzero()[:, 0]
            part = slice(int(tokens[0]), int(tokens[-1]) + 1)
            is_token = (segment_ids[row, part] == document)[None, :, None]
            leaf = (u[row, part] * is_token).requires_grad_()
            # The twin serves here: what is compared is where documents begin and end.
            alone = ssm_conv_chunked(leaf, system, backend="torch")
            alone.backward(upstream[row, part] * is_token)
            for a, e in ((y, alone.detach()), (du, leaf.grad)):
                expected = (e * is_token)[0]
                torch.testing.assert_close(a[row, part], expected, rtol=0, atol=1e-5 * max(1.0, a.abs().max().item()))


def test_documents_do_not_leak_not_even_nan() -> None:
    u, system = randn(1, 100, 2, seed=8), any_system(16)
    segment_ids = torch.tensor([[0] * 5 + [1] * 35 + [2] * 25 + [3] * 32 + [0] * 3], device=DEVICE)
    changed = torch.where((segment_ids == 2)[:, :, None], 1e6, u).masked_fill((segment_ids == 0)[:, :, None], torch.nan)
    others = [*range(40), *range(65, 100)]
    for dtype in (torch.float32, torch.bfloat16):
        y, z = (ssm_conv_chunked(x.to(dtype), system, segment_ids=segment_ids, backend="triton") for x in (u, changed))
        if dtype == torch.float32:
            assert torch.equal(y[:, others], z[:, others])
        else:
            # Documents of one chunk share its scale, so a huge one costs its neighbours their smallest bits.
            assert_near("y", z[:, others], y[:, others].double(), 1e-3)


def test_small_gradients_survive_half_precision() -> None:
    """Far below float16's range, and not so much as rounded differently when the size is a power of two."""
    u, system = randn(2, 65, 2, seed=8, dtype=torch.bfloat16), any_system(16)
    usual = run(u, system, None, "triton")
    tiny = run(u, system, None, "triton", scale=2.0**-40)
    for a, e in zip(tiny[1:], usual[1:], strict=True):
        assert torch.equal(a * 2.0**40, e)


def test_twice_the_error_of_torch_in_half_precision_at_most() -> None:
    """Both round the output; what ours adds by float16 factors stays below what that rounding costs."""
    u, system = randn(2, 200, 2, seed=8, dtype=torch.bfloat16), any_system(32)
    ours, in_torch = (run(u, system, None, backend, trains=False)[0] for backend in ("triton", "torch"))
    reference = ssm_conv_chunked(u.double(), ChunkedSystem(*(x.double() for x in system)), backend="torch")
    error, allowed = ((x.double() - reference).abs().max().item() for x in (ours, in_torch))
    # The interpreter cuts bits off where a GPU rounds: twice the error, so twice again.
    assert error <= 4 * allowed


def test_frozen_system_in_half_precision_gives_the_same() -> None:
    u, system = randn(2, 65, 2, seed=8, dtype=torch.bfloat16), any_system(16)
    expected = run(u, system, None, "triton", trains=False)
    actual = run(u, system.half(), None, "triton", trains=False)
    assert len(actual) == 2
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_two_runs_are_bitwise_equal() -> None:
    u, system, segment_ids = randn(3, 127, 2, seed=8), any_system(16), packed_rows(3, 127)
    first, second = (run(u, system, segment_ids, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_takes_any_strides() -> None:
    u, system = randn(2, 65, 2, seed=8), any_system(16)
    expected = run(u, system, None, "triton")
    channels_first = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert channels_first.stride(1) == 1
    wide = torch.cat((u, u), dim=2)[:, :, :2]
    strided = ChunkedSystem(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in system))
    for tensors in ((channels_first, system), (wide, system), (u, strided)):
        actual = run(*tensors, None, "triton")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    y = ssm_conv_chunked(channels_first, system, backend="triton")
    assert y.stride(1) == 1


def test_row_of_padding_only_is_zero() -> None:
    results = run(
        randn(2, 40, 2, seed=8), any_system(16), torch.zeros(2, 40, dtype=torch.int64, device=DEVICE), "triton"
    )
    assert all((x == 0).all() for x in results)


def test_is_one_operator_with_a_fake_and_a_gradient() -> None:
    system = ChunkedSystem(*(x.requires_grad_() for x in any_system(16)))
    u_BDL = randn(2, 2, 40, seed=8).requires_grad_()
    torch.library.opcheck(torch.ops.spade_t5.ssm_conv_chunked, (u_BDL, *system, None, None, None))


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def _checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False)


def _under_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return function(*arguments)

    return call


@pytest.mark.parametrize("wrap", [_compiled, _checkpointed, _under_autocast])
def test_wrapped_runs_give_the_same(wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    segment_ids = packed_rows(3, 65)

    def call(u: Tensor, *system: Tensor) -> Tensor:
        return ssm_conv_chunked(u, ChunkedSystem(*system), segment_ids=segment_ids, backend="triton")

    results = []
    for function in (call, wrap(call)):
        leaves = [x.clone().requires_grad_() for x in (randn(3, 65, 2, seed=8), *any_system(16))]
        y = function(*leaves)
        y.backward(randn(3, 65, 2, seed=9))
        results.append([y.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


def test_longer_rows_take_longer_chunks() -> None:
    sizes = [chunk_tokens(length, DEVICE) for length in (1, 512, 2048, 1 << 20)]
    assert sizes == sorted(sizes)
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [64, 128, 256])
@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_real_sizes_on_a_gpu(tokens: int, is_dense: bool, is_packed: bool) -> None:
    length, d_model = 4099, 48
    system = any_system(tokens, d_model=d_model, num_states=64, is_dense=is_dense)
    segment_ids = None
    if is_packed:
        lengths = torch.tensor([1000, 7, 1, 300, 1500, 1000, 291])
        ids = torch.tensor([0, 1, 2, 3, 4, 5, 0])
        segment_ids = ids.repeat_interleave(lengths).expand(3, -1).to(DEVICE)
    for dtype in (torch.float32, *HALF):
        u = randn(3, length, d_model, seed=8, dtype=dtype)
        leaves = [[x.clone().requires_grad_() for x in (u, *system)] for _ in range(2)]
        leaves.append([x.double().requires_grad_() for x in (u, *system)])
        results = []
        for tensors, backend in zip(leaves, ("triton", "triton", "torch"), strict=True):
            y = ssm_conv_chunked(tensors[0], ChunkedSystem(*tensors[1:]), segment_ids=segment_ids, backend=backend)
            y.backward(randn(3, length, d_model, seed=9, dtype=dtype).to(y))
            results.append([y.detach(), *(x.grad for x in tensors)])
        assert_all_near(results[0], results[2], dtype)
        assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))

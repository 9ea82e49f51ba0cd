"""The chunked SSM convolution: sizes of chunks, dense and diagonal, packed and not; frozen and trained systems."""

import itertools
from collections.abc import Callable

import torch

from spade_t5.kernels.ssm_conv.system import ChunkedSystem
from spade_t5.kernels.ssm_conv.triton_op import ssm_conv_chunked_triton

_LENGTH, _D_MODEL = 512, 16


def _call(
    dtype: torch.dtype,
    tokens: int,
    *,
    is_dense: bool,
    is_packed: bool,
    trains: bool = True,
    num_sides: int = 2,
    num_states: int = 64,
) -> None:
    states = num_sides * num_states
    system = ChunkedSystem(
        torch.zeros(_D_MODEL, tokens, tokens, requires_grad=trains),
        torch.zeros(_D_MODEL, states, tokens, requires_grad=trains),
        torch.zeros(_D_MODEL, tokens, states, requires_grad=trains),
        torch.zeros(_D_MODEL, *[num_states] * (2 if is_dense else 1), requires_grad=trains),
    )
    u = torch.zeros(2, _LENGTH, _D_MODEL, dtype=dtype, requires_grad=True)
    segment_ids = torch.ones(2, _LENGTH, dtype=torch.int64) if is_packed else None
    ssm_conv_chunked_triton(u, system, segment_ids).sum().backward()


CASES: dict[str, Callable[[], None]] = {
    f"{str(dtype).removeprefix('torch.')}/{tokens}/{'dense' if is_dense else 'diagonal'}{'/packed' * is_packed}": (
        lambda dtype=dtype, tokens=tokens, is_dense=is_dense, is_packed=is_packed: _call(  # type: ignore[misc]
            dtype, tokens, is_dense=is_dense, is_packed=is_packed
        )
    )
    for dtype, tokens, is_dense, is_packed in itertools.product(
        (torch.bfloat16, torch.float32), (64, 128, 256), (True, False), (False, True)
    )
}
CASES["float16/128/dense/packed"] = lambda: _call(torch.float16, 128, is_dense=True, is_packed=True)
CASES["bfloat16/256/dense/packed/frozen"] = lambda: _call(
    torch.bfloat16, 256, is_dense=True, is_packed=True, trains=False
)
CASES["bfloat16/128/dense/causal"] = lambda: _call(torch.bfloat16, 128, is_dense=True, is_packed=False, num_sides=1)
CASES["bfloat16/128/dense/packed/frozen/128 states"] = lambda: _call(
    torch.bfloat16, 128, is_dense=True, is_packed=True, trains=False, num_states=128
)

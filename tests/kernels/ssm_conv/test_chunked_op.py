"""Wrong use of `ssm_conv_chunked` is refused with the argument, its value and a remedy."""

from typing import Any

import pytest
import torch

from spade_t5.kernels.ssm_conv import ChunkedSystem, ssm_conv_chunked

F64 = torch.float64
SYSTEM = {
    "local": torch.zeros(3, 16, 16),
    "w": torch.zeros(3, 8, 16),
    "p": torch.zeros(3, 16, 8),
    "transition": torch.zeros(3, 4, 4),
}


def call(backend: str = "torch", **changes: Any) -> torch.Tensor:
    arguments = {"u": torch.zeros(1, 5, 3), "segment_ids": None} | SYSTEM | changes
    u, segment_ids = arguments.pop("u"), arguments.pop("segment_ids")
    return ssm_conv_chunked(u, ChunkedSystem(**arguments), segment_ids=segment_ids, backend=backend)


def test_right_use_is_accepted() -> None:
    for backend in ("torch", "naive", "triton"):
        assert call(backend).shape == (1, 5, 3)
        assert call(backend, transition=torch.zeros(3, 4)).shape == (1, 5, 3)
    assert call(w=torch.zeros(3, 4, 16), p=torch.zeros(3, 16, 4)).shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(5, 3)}, r"u has shape \(5, 3\); expected"),
        ({"u": torch.zeros(0, 5, 3)}, r"u has shape \(0, 5, 3\); expected a non-empty"),
        ({"u": torch.zeros(1, 5, 3, dtype=torch.int64)}, r"u has dtype torch.int64; cast"),
        ({"local": torch.zeros(3, 16, 15)}, r"system.local has shape \(3, 16, 15\); expected \(3, T, T\)"),
        ({"local": torch.zeros(2, 16, 16)}, r"system.local has shape \(2, 16, 16\); expected \(3, T, T\)"),
        ({"transition": torch.zeros(3, 4, 5)}, r"system.transition has shape \(3, 4, 5\); expected \(3, N, N\), or"),
        ({"transition": torch.zeros(3, 3)}, r"system.transition has 3 real states a side; a diagonal system has"),
        ({"w": torch.zeros(3, 12, 16)}, r"system.w has shape \(3, 12, 16\); expected \(3, 4 or 8, 16\)"),
        ({"p": torch.zeros(3, 16, 4)}, r"system.p has shape \(3, 16, 4\); expected \(3, 16, 8\)"),
        ({"w": torch.zeros(3, 8, 16, dtype=torch.bfloat16)}, r"system.w has dtype torch.bfloat16; keep it in float32"),
        ({"w": torch.zeros(3, 8, 16, dtype=torch.float16)}, r"system.w has dtype torch.float16; keep it in float32"),
        ({"p": torch.zeros(3, 16, 8, device="meta")}, r"system.p is on meta; move it to cpu, where u is"),
        ({"segment_ids": torch.ones(2, 5, dtype=torch.int64)}, r"segment_ids has shape \(2, 5\); expected"),
        ({"segment_ids": torch.tensor([[2, 2, 0, 1, 1]])}, r"segment_ids decrease within a row; number"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown"),
        ({"backend": "triton", "u": torch.zeros(1, 5, 3, dtype=F64)}, r"u is float64: the Triton kernels take"),
        (
            {"backend": "triton", "transition": torch.zeros(3, 4, 4, dtype=F64)},
            r"system.transition is float64: .* choose backend 'torch'",
        ),
        (
            {
                "backend": "triton",
                "local": torch.zeros(3, 24, 24),
                "w": torch.zeros(3, 8, 24),
                "p": torch.zeros(3, 24, 8),
            },
            r"system.local has chunks of 24 tokens; Triton takes a power of two of at least 16: build the system for",
        ),
        (
            {
                "backend": "triton",
                "w": torch.zeros(3, 130, 16),
                "p": torch.zeros(3, 16, 130),
                "transition": torch.zeros(3, 130, 130),
            },
            r"system.transition has 130 states a side; Triton holds .* at most 128: choose fewer, a diagonal system",
        ),
    ],
)
def test_wrong_use_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_matrices_in_float16_need_a_frozen_system() -> None:
    half = {name: SYSTEM[name].half() for name in ("local", "w", "p")}
    u = torch.zeros(1, 5, 3, dtype=torch.bfloat16)
    assert call(u=u, **half).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"system.local has dtype torch.float16; keep it in float32"):
        call(u=u, **half, transition=torch.zeros(3, 4, 4, requires_grad=True))

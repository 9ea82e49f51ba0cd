"""Wrong use of `local_attention` is refused with the argument, its value and a remedy."""

from typing import Any

import pytest
import torch

from spade_t5.kernels.local_attention import local_attention


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 5, 2, 4),
        "k": torch.zeros(1, 5, 2, 4),
        "v": torch.zeros(1, 5, 2, 4),
        "offset_bias": torch.zeros(2, 3),
        "left": 1,
        "right": 1,
    }
    return local_attention(**(arguments | changes))


def test_right_use_is_accepted() -> None:
    assert call().shape == (1, 5, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 2, 4)}, r"q has shape \(5, 2, 4\); expected"),
        ({"q": torch.zeros(0, 5, 2, 4)}, r"q has shape \(0, 5, 2, 4\); expected a non-empty"),
        ({"q": torch.zeros(1, 5, 2, 4, dtype=torch.int64)}, r"q has dtype torch.int64; cast"),
        ({"k": torch.zeros(1, 6, 2, 4)}, r"k has shape \(1, 6, 2, 4\); it must equal"),
        ({"v": torch.zeros(1, 5, 2, 4, dtype=torch.float64)}, r"v is torch.float64 on cpu; it must be"),
        ({"v": torch.zeros(1, 5, 2, 4, device="meta")}, r"v is torch.float32 on meta; it must be"),
        ({"left": -1}, r"left=-1 is negative; give"),
        ({"right": -3}, r"right=-3 is negative; give"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0 is outside"),
        ({"offset_bias": torch.zeros(2, 4)}, r"offset_bias has shape \(2, 4\); expected \(2, 2D \+ 1\)"),
        ({"offset_bias": torch.zeros(1, 3)}, r"offset_bias has shape \(1, 3\)"),
        ({"offset_bias": torch.zeros(2, 3, dtype=torch.bfloat16)}, r"offset_bias has dtype torch.bfloat16; keep"),
        ({"offset_bias": torch.zeros(2, 3, device="meta")}, r"offset_bias is on meta; move"),
        ({"segment_ids": torch.ones(1, 4, dtype=torch.int64)}, r"segment_ids has shape \(1, 4\); expected"),
        ({"segment_ids": torch.ones(1, 5)}, r"segment_ids has dtype torch.float32; cast"),
        ({"backend": "triton"}, r"q has d_kv=4: the Triton kernels take 16, 32, 64, 128; choose backend 'torch'"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown; use one of 'auto', 'triton', 'torch', 'naive'"),
    ],
)
def test_wrong_use_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)

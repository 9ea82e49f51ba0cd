"""Wrong use of `ssm_conv` is refused with the argument, its value and a remedy."""

from typing import Any

import pytest
import torch

from spade_t5.kernels.ssm_conv import ssm_conv


def call(**changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"u": torch.zeros(1, 5, 3), "ssm_kernel": torch.zeros(2, 3, 5), "skip": torch.zeros(3)}
    return ssm_conv(**(arguments | changes))


def test_right_use_is_accepted() -> None:
    assert call().shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(5, 3)}, r"u has shape \(5, 3\); expected"),
        ({"u": torch.zeros(1, 0, 3)}, r"u has shape \(1, 0, 3\); expected a non-empty"),
        ({"u": torch.zeros(1, 5, 3, dtype=torch.int64)}, r"u has dtype torch.int64; cast"),
        ({"ssm_kernel": torch.zeros(2, 3, 4)}, r"ssm_kernel has shape \(2, 3, 4\); expected \(1 or 2, 3, at least 5"),
        ({"ssm_kernel": torch.zeros(3, 3, 5)}, r"ssm_kernel has shape \(3, 3, 5\)"),
        ({"ssm_kernel": torch.zeros(2, 3, 5, dtype=torch.bfloat16)}, r"ssm_kernel has dtype torch.bfloat16; keep"),
        ({"ssm_kernel": torch.zeros(2, 3, 5, device="meta")}, r"ssm_kernel is on meta; move"),
        ({"skip": torch.zeros(4)}, r"skip has shape \(4,\); expected \(3,\)"),
        ({"skip": torch.zeros(3, dtype=torch.float16)}, r"skip has dtype torch.float16; keep"),
        ({"segment_ids": torch.ones(2, 5, dtype=torch.int64)}, r"segment_ids has shape \(2, 5\); expected"),
        ({"segment_ids": torch.ones(1, 5, dtype=torch.int32)}, r"segment_ids has dtype torch.int32; cast"),
        ({"segment_ids": torch.tensor([[2, 2, 0, 1, 1]])}, r"segment_ids decrease within a row; number"),
        (
            {"ssm_kernel_f": torch.zeros(3, 4, dtype=torch.complex64)},
            r"ssm_kernel_f has shape \(3, 4\); expected \(3, 6\)",
        ),
        (
            {"ssm_kernel": torch.zeros(2, 3, 5, requires_grad=True), "ssm_kernel_f": torch.zeros(3, 6)},
            r"ssm_kernel_f is given although",
        ),
        ({"backend": "triton"}, r"backend='triton' cannot convolve with an impulse response; use ssm_conv_chunked"),
    ],
)
def test_wrong_use_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)

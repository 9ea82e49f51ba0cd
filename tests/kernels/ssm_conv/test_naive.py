"""The dense reference against sums over lags written out by hand."""

import pytest
import torch

from spade_t5.kernels.ssm_conv import ssm_conv_naive

F64 = torch.float64


@pytest.mark.parametrize("num_sides", [1, 2])
def test_equals_the_sum_over_lags(num_sides: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, length, d_model = 2, 7, 3
    u = torch.randn(batch, length, d_model, generator=generator, dtype=F64)
    ssm_kernel = torch.randn(num_sides, d_model, length + 2, generator=generator, dtype=F64)
    skip = torch.randn(d_model, generator=generator, dtype=F64)
    # A document that starts late, one of one token, one with padding inside it; padding at the end.
    segment_ids = torch.tensor([[0, 1, 1, 2, 3, 3, 3], [1, 0, 1, 1, 2, 2, 0]])

    y = ssm_conv_naive(u, ssm_kernel, skip, segment_ids)

    for b in range(batch):
        for t in range(length):
            expected = torch.zeros(d_model, dtype=F64)
            for s in range(length):
                if segment_ids[b, s] == segment_ids[b, t] != 0:
                    if t >= s:
                        expected += ssm_kernel[0, :, t - s] * u[b, s]
                    elif num_sides == 2:
                        expected += ssm_kernel[1, :, s - t - 1] * u[b, s]
            if segment_ids[b, t] != 0:
                expected += skip * u[b, t]
            torch.testing.assert_close(y[b, t], expected)

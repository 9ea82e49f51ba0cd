"""The dense reference against sums written out by hand."""

import math

import torch

from spade_t5.kernels.local_attention import local_attention_naive, local_attention_probabilities

F64 = torch.float64


def test_equals_the_formula_written_as_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, length, num_heads, d_kv, max_offset, left, right = 2, 6, 2, 3, 1, 2, 1
    q, k, v = torch.randn(3, batch, length, num_heads, d_kv, generator=generator, dtype=F64)
    bias = torch.randn(num_heads, 2 * max_offset + 1, generator=generator, dtype=F64)
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 1, 2, 2, 2, 2]])

    o = local_attention_naive(q, k, v, bias, left, right, segment_ids)

    for b in range(batch):
        for h in range(num_heads):
            for i in range(length):
                weights = {
                    j: math.exp(q[b, i, h] @ k[b, j, h] + bias[h, max(-1, min(1, j - i)) + max_offset])
                    for j in range(length)
                    if -left <= j - i <= right and segment_ids[b, i] == segment_ids[b, j] != 0
                }
                total = sum(weights.values())
                expected = sum((w / total * v[b, j, h] for j, w in weights.items()), torch.zeros(d_kv, dtype=F64))
                torch.testing.assert_close(o[b, i, h], expected)


def test_probabilities_are_zero_outside_window_and_document() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 5, 1, 4, generator=generator)
    segment_ids = torch.tensor([[1, 1, 1, 2, 0]])

    p = local_attention_probabilities(q, k, None, 1, 1, segment_ids)[0, 0]

    is_visible = torch.tensor(
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool
    )
    assert torch.equal(p > 0, is_visible)
    torch.testing.assert_close(p.sum(dim=-1), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 64, 1, 4)
    v = torch.ones(1, 64, 1, 4)
    o = local_attention_naive(q, k, v, None, None, None, dropout_p=0.25)
    assert o.std() > 0
    # 64 x 64 independent weights of 1/64, each kept with probability 3/4: standard deviation of the mean is 0.009.
    assert abs(o.mean() - 1.0) < 0.04

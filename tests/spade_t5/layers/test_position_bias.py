"""Relative position buckets and the bias by offset."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from spade_t5.layers.attention import dense_bias, offsets_between
from spade_t5.layers.position_bias import PositionEmbedding, RelativeAttentionBias, relative_position_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (128, 256), (16, 20), (32, 1000)])
def test_buckets_equal_those_of_t5(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    offsets = torch.arange(-4096, 4097)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    expected = T5Attention._relative_position_bucket(offsets, **options)
    assert torch.equal(relative_position_buckets(offsets, **options), expected)


def test_buckets_by_example() -> None:
    offsets = torch.tensor([0, -1, -7, -8, -200, 1, 200])
    both = relative_position_buckets(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    assert both.tolist() == [0, 1, 7, 8, 15, 17, 31]
    past = relative_position_buckets(offsets, bidirectional=False, num_buckets=32, max_distance=128)
    assert past.tolist() == [0, 1, 7, 8, 31, 0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("reach", [0, 5, 128])
def test_bias_by_offset_is_the_table_by_bucket(bidirectional: bool, reach: int) -> None:
    """A reach of `max_distance` stands for all offsets; a shorter one for those within it."""
    module = RelativeAttentionBias(3, num_buckets=32, max_distance=128, bidirectional=bidirectional, std=1.0)
    offsets = offsets_between(40, 300, 200, torch.device("cpu"))
    offsets = offsets if reach == 128 else offsets.clamp(-reach, reach)
    buckets = relative_position_buckets(offsets, bidirectional=bidirectional, num_buckets=32, max_distance=128)
    assert torch.equal(dense_bias(module(reach), offsets), module.weight[buckets].permute(2, 0, 1))


def test_bias_dtype_and_gradient() -> None:
    module = RelativeAttentionBias(2, num_buckets=8, max_distance=16, bidirectional=True, std=1.0)
    assert module.to(torch.bfloat16)(4).dtype == torch.float32
    assert module.to(torch.float64)(4).dtype == torch.float64
    module(4).sum().backward()
    # offsets -4..4: of two exact buckets a side, then two logarithmic ones
    assert module.weight.grad[:, 0].tolist() == [1, 1, 3, 0, 0, 1, 3, 0]
    assert not module.state_dict().keys() - {"weight"}


def test_positions_are_counted_from_zero() -> None:
    module = PositionEmbedding(6, 4)
    assert torch.equal(module(torch.tensor([[0, 5]])), module.weight[[0, 5]][None])

"""Local self-attention against attention with a dense mask."""

import pytest
import torch
from torch import Tensor

from spade_t5.layers.attention import CausalSelfAttention, CrossAttention, LocalSelfAttention
from spade_t5.layers.position_bias import RelativeAttentionBias, relative_position_buckets
from spade_t5.layers.segments import SourceView

TOLERANCE = 1e-5  # of each tensor's largest entry, fp32


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max() + 1e-12, name


def dense_attention(
    layer: LocalSelfAttention, bias: RelativeAttentionBias, x: Tensor, radius: int, is_token: Tensor
) -> Tensor:
    """The definition: all scores, a mask, a softmax."""
    length = x.shape[1]
    q, k, v = (
        project(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for project in (layer.q, layer.k, layer.v)
    )
    offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    buckets = relative_position_buckets(offsets, bidirectional=True, num_buckets=32, max_distance=128)
    scores = q @ k.transpose(-1, -2) + bias.weight[buckets].permute(2, 0, 1)
    visible = (offsets.abs() <= radius)[None, None] & is_token[:, None, None, :]
    out = scores.masked_fill(~visible, -1e9).softmax(-1) @ v
    return layer.o(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("length", [1, 63, 500])
@pytest.mark.parametrize("radius", [0, 7, 40, 127, 600])
def test_window_equals_a_dense_mask(length: int, radius: int) -> None:
    torch.manual_seed(0)
    layer = LocalSelfAttention(24, 3, 8, radius=radius, dropout_rate=0.0, scale=1.0)
    bias = RelativeAttentionBias(3, num_buckets=32, max_distance=128, bidirectional=True, std=1.0)
    x = torch.randn(2, length, 24, requires_grad=True)
    segment_ids = torch.ones(2, length, dtype=torch.long)
    if length > 1:
        segment_ids[1, length * 2 // 3 :] = 0
    is_token = segment_ids != 0
    weight = torch.randn(2, length, 24) * is_token[..., None]
    inputs = [x, *layer.parameters(), bias.weight]

    found, _ = layer(x, bias(min(radius, 128)), segment_ids)
    expected = dense_attention(layer, bias, x, radius, is_token)
    assert_close(found[is_token], expected[is_token], "output")
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    found_gradients = torch.autograd.grad((found * weight).sum(), inputs)
    for i, (ours, theirs) in enumerate(zip(found_gradients, expected_gradients, strict=True)):
        if length > 1 and radius > 0:
            assert_close(ours, theirs, f"gradient {i}")
        else:  # one key: the softmax is constant and only v and o have a gradient
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_query_without_any_source_gets_nothing() -> None:
    """Rows of the cross-attention that see no source token are 0 and pass no gradient, not NaN."""
    torch.manual_seed(0)
    layer = CrossAttention(16, 2, 8, dropout_rate=0.0)
    x, source = torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 4, 16, requires_grad=True)
    view = SourceView(torch.tensor([[1, 3, 2]]), torch.tensor([[1, 1, 2, 0]]))
    visible = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]]).bool()
    out, weights = layer(x, source, view, with_weights=True)
    assert torch.equal(out[0, 1], torch.zeros(16))
    assert torch.equal(weights != 0, visible[:, None].expand(1, 2, 3, 4))
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[0, 1].any()
    assert not source.grad[0, 3].any()


def test_scale_multiplies_the_scores() -> None:
    torch.manual_seed(0)
    plain = CausalSelfAttention(16, 2, 8, dropout_rate=0.0)
    scaled = CausalSelfAttention(16, 2, 8, dropout_rate=0.0, scale=0.25)
    assert scaled.q.std == plain.q.std * 4
    scaled.load_state_dict({**plain.state_dict(), "q.weight": plain.q.weight * 4})
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(scaled(x, None, None)[0], plain(x, None, None)[0])


def test_dropout_is_of_training_only() -> None:
    torch.manual_seed(0)
    layer = LocalSelfAttention(16, 2, 8, radius=3, dropout_rate=0.5, scale=1.0)
    x = torch.randn(1, 9, 16)
    assert not torch.equal(layer(x, None, None)[0], layer(x, None, None)[0])
    layer.eval()
    assert torch.equal(layer(x, None, None)[0], layer(x, None, None)[0])

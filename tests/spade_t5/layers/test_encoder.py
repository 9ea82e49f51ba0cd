"""An encoder layer against the equations it is built from."""

import pytest
import torch
from torch import Tensor

from spade_t5 import SpadeT5Config
from spade_t5.layers.encoder import EncoderLayer, EncoderStack


def make_layer(**options: object) -> EncoderLayer:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "local_radius": 3, "d_state": 8}
    return EncoderLayer(SpadeT5Config(**{**sizes, **options}).layers_config(), is_global=True)


@pytest.mark.parametrize("fusion", ["concat", "add", "stack", "gated"])
def test_pre_norm_global_layer(fusion: str) -> None:
    """h = norm(x); a = fuse(S4(h), attention(h)); x + a; then the feed-forward."""
    layer, x, bias = make_layer(fusion=fusion), torch.randn(1, 10, 16), torch.randn(2, 7)
    h = layer.self_attention_norm(x)[0]
    g = layer.global_mixer(h, None)
    a = layer.fusion(g, layer.self_attention(g if fusion == "stack" else h, bias, None)[0])
    y = x + a
    expected = y + layer.feed_forward(layer.feed_forward_norm(y))
    torch.testing.assert_close(layer(x, bias, None, None)[0], expected)


def test_post_norm_global_layer() -> None:
    """y = norm(x + fuse(S4(x), attention(x))); norm(y + feed_forward(y))."""
    layer, x, bias = make_layer(norm_placement="post", norm_type="layer"), torch.randn(1, 10, 16), torch.randn(2, 7)
    y = layer.self_attention_norm(x + layer.fusion(layer.global_mixer(x, None), layer.self_attention(x, bias, None)[0]))
    expected = layer.feed_forward_norm(y + layer.feed_forward(y))
    torch.testing.assert_close(layer(x, bias, None, None)[0], expected)


def reach(stack: EncoderStack, length: int, changed: int) -> Tensor:
    """Positions whose state changes with the input at one position."""
    x = torch.randn(1, length, 16)
    y = x.clone()
    y[0, changed] += 1.0
    with torch.no_grad():
        difference = stack.run(y, None).last_hidden_state - stack.run(x, None).last_hidden_state
    return difference[0].abs().amax(-1) > 1e-7


def test_reach_of_local_and_global_layers() -> None:
    """Two layers of radius 3 reach 6 tokens; a global layer reaches everywhere; chunks stay within their block."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "local_radius": 3, "d_state": 8}

    def stack(**options: object) -> EncoderStack:
        return EncoderStack(SpadeT5Config(**{**sizes, **options}).layers_config()).eval()

    local = reach(stack(global_layers=[]), 40, 20).nonzero().flatten().tolist()
    assert local == list(range(14, 27))
    chunk = reach(stack(global_layers=[], local_attention="chunk"), 40, 20).nonzero().flatten().tolist()
    assert chunk == [20, 21, 22, 23]
    assert bool(reach(stack(), 40, 20).all())

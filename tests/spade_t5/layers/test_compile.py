"""Layers compile into one graph each on the Triton path: no graph breaks, same outputs and gradients as eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spade_t5.configuration import SpadeT5Config
from spade_t5.kernels import backend
from spade_t5.layers.decoder import DecoderLayer
from spade_t5.layers.encoder import EncoderLayer, encoder_bias
from spade_t5.layers.segments import SourceView

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# without a GPU inductor has nothing to make of an interpreted kernel, so the graph runs as it was traced
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"
CONFIG = SpadeT5Config(
    vocab_size=61, d_model=32, d_kv=16, d_ff=48, num_heads=2, d_state=16, local_radius=7, dropout_rate=0.0
).layers_config()
SEGMENTS = torch.tensor([[1] * 9 + [2] * 8 + [0] * 3, [1] * 20], device=DEVICE)


def outputs_and_gradients(run: Callable[..., Any], module: nn.Module, x_BLD: Tensor, *others: Any) -> list[Tensor]:
    module.zero_grad()
    x_BLD = x_BLD.detach().requires_grad_()
    out_BLD = run(x_BLD, *others)[0]
    out_BLD.square().sum().backward()
    return [out_BLD, x_BLD.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.skipif(not backend._HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("kind", ["encoder", "global encoder", "decoder"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_layer_is_one_graph(kind: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPADE_T5_BACKEND", "triton")
    torch.manual_seed(0)
    segments = SEGMENTS if is_packed else None
    x_BLD = torch.randn(2, 20, 32, device=DEVICE)
    offset_bias = encoder_bias(CONFIG).to(DEVICE)(7).detach()
    layer: nn.Module
    if kind == "decoder":
        layer = DecoderLayer(CONFIG, 0)
        others = (torch.randn(2, 20, 32, device=DEVICE), offset_bias, segments, SourceView(segments, segments))
    else:
        layer = EncoderLayer(CONFIG, is_global=kind == "global encoder")
        others = (offset_bias, segments, segments)
    layer.to(DEVICE)
    expected = outputs_and_gradients(layer, layer, x_BLD, *others)
    compiled = torch.compile(layer, backend=COMPILER, fullgraph=True)
    found = outputs_and_gradients(compiled, layer, x_BLD, *others)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())

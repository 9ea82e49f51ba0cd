"""The four ways to join the branches of a global layer, against their formulas."""

import torch

from spade_t5.layers.fusion import FUSIONS


def test_formulas() -> None:
    torch.manual_seed(0)
    g, local = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    both = torch.cat([norm(g), norm(local)], dim=-1)
    concat = FUSIONS["concat"](8, "rms", 1e-6)
    torch.testing.assert_close(concat(g, local), both @ concat.out.weight.T + concat.out.bias)
    torch.testing.assert_close(FUSIONS["add"](8, "rms", 1e-6)(g, local), 0.5 * norm(g) + 0.5 * norm(local))
    gated = FUSIONS["gated"](8, "rms", 1e-6)
    gate = torch.sigmoid(both @ gated.gate.weight.T + gated.gate.bias)
    torch.testing.assert_close(gated(g, local), gate * norm(g) + (1 - gate) * norm(local))
    stack = FUSIONS["stack"](8, "rms", 1e-6)
    assert stack.serial
    assert stack(g, local) is local
    assert not any(FUSIONS[name](8, "rms", 1e-6).serial for name in ("concat", "add", "gated"))

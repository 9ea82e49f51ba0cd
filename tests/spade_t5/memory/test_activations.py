"""What is traced without values against what PyTorch's allocator sees in a real pass."""

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.layers.head import TokenLossConfig
from spade_t5.memory.activations import Workload, measure_activations, trace_activations
from spade_t5.training.recomputation import recompute


def workload(**fields: Any) -> Workload:
    values: dict[str, Any] = {
        "rows": 1,
        "inputs_length": 512,
        "targets_length": 114,
        "precision": "fp32",
        "recomputation": "none",
        "backend": "torch",
    }
    return Workload(**{**values, **fields})


def peak_of_allocator(model: SpadeT5ForConditionalGeneration, batch: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes at most allocated by a forward and a backward pass."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            loss = model(**batch, token_loss=TokenLossConfig(), use_cache=False).loss
        loss.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("precision", "recomputation"), [("fp32", "none"), ("bf16_autocast", "none"), ("fp32", "selective")]
)
def test_small_takes_what_was_traced(precision: str, recomputation: Any) -> None:
    config = SpadeT5Config.from_preset("small")
    traced = trace_activations(config, workload(rows=2, precision=precision, recomputation=recomputation))
    model = SpadeT5ForConditionalGeneration(config).train()
    batch = {"input_ids": torch.full((2, 512), 5), "labels": torch.full((2, 114), 5)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
        model(**batch, use_cache=False)  # which fills the caches of the frozen state-space model
    recompute(model, recomputation)
    assert traced.peak == pytest.approx(peak_of_allocator(model, batch, precision), rel=0.1)


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_a_real_pass_counts_the_same(recomputation: Any) -> None:
    config = SpadeT5Config.from_preset("tiny", vocab_size=300)
    traced = trace_activations(
        config, workload(inputs_length=130, targets_length=20, recomputation=recomputation, precision="bf16_autocast")
    )
    model = SpadeT5ForConditionalGeneration(config).train()
    recompute(model, recomputation)
    batch = {"input_ids": torch.full((1, 130), 5), "labels": torch.full((1, 20), 5)}
    assert measure_activations(model, batch, "bf16_autocast") == traced


def test_less_is_kept_where_more_is_recomputed() -> None:
    config = SpadeT5Config.from_preset("tiny", vocab_size=300)
    saved = [
        trace_activations(config, workload(recomputation=policy, precision="bf16", backend="triton")).saved
        for policy in ("none", "selective", "full")
    ]
    assert saved[0] > saved[1] > saved[2]


def test_a_classifier_has_no_decoder() -> None:
    config = SpadeT5Config.from_preset("mini", vocab_size=300)
    with_decoder = trace_activations(config, workload(backend="triton"))
    assert 0 < trace_activations(config, workload(targets_length=0, backend="triton")).saved < with_decoder.saved

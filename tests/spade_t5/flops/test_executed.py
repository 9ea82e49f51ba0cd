"""Executed FLOPs against PyTorch's counter, which sees every product that runs."""

from typing import Any

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification
from spade_t5.flops import FlopsCounter
from spade_t5.layers.head import TokenLossConfig
from spade_t5.testing.torch_flops import torch_flops
from spade_t5.training.data import Batch
from spade_t5.training.recomputation import Recomputation, recompute


def sentences(rows: int, inputs: int, targets: int) -> Batch:
    """Rows without padding, one document each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(3, 90, (rows, inputs), generator=generator),
        "labels": torch.randint(3, 90, (rows, targets), generator=generator),
    }


def packed() -> Batch:
    """Three documents and padding in one row, one and more padding in the other."""
    batch = sentences(2, 192, 48)
    batch["segment_ids"], batch["decoder_segment_ids"] = torch.zeros(2, 192).long(), torch.zeros(2, 48).long()
    for row, first, end, target_first, target_end, document in (
        (0, 0, 100, 0, 20, 1),
        (0, 100, 110, 20, 23, 2),
        (0, 110, 180, 23, 40, 3),
        (1, 0, 64, 0, 12, 1),
    ):
        batch["segment_ids"][row, first:end] = document
        batch["decoder_segment_ids"][row, target_first:target_end] = document
    batch["labels"].masked_fill_(batch["decoder_segment_ids"] == 0, -100)
    return batch


def counted_and_seen(
    batch: Batch,
    *,
    precision: torch.dtype = torch.float32,
    recomputation: Recomputation = "none",
    backend: str = "torch",
    **fields: Any,
) -> tuple[float, int]:
    """Executed FLOPs by our count, and by PyTorch's."""
    config = SpadeT5Config.from_preset("tiny", vocab_size=100, **fields)
    torch.manual_seed(0)
    model = SpadeT5ForConditionalGeneration(config).train()
    recompute(model, recomputation)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = model(**batch, use_cache=False, token_loss=TokenLossConfig()).loss
        loss.backward()

    step()  # which fills the caches of the frozen state-space model
    counter = FlopsCounter(config, backend=backend, dtype=precision, recomputation=recomputation)
    return counter.batch(batch).executed, torch_flops(step)


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["window", "full", "chunk"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_whole_rows(attention: str, precision: torch.dtype, recomputation: Recomputation) -> None:
    counted, seen = counted_and_seen(
        sentences(2, 200, 57), precision=precision, recomputation=recomputation, local_attention=attention
    )
    assert counted == pytest.approx(seen, rel=1e-3)


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_packed_rows(recomputation: Recomputation) -> None:
    counted, seen = counted_and_seen(packed(), recomputation=recomputation)
    assert counted == pytest.approx(seen, rel=2e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"global_layers": []},
        {"global_layers": [0, 1], "fusion": "gated"},
        {"fusion": "add", "feed_forward_proj": "relu"},
        {"norm_placement": "post", "norm_type": "layer", "use_bias": True},
        {"dropout_rate": 0.1},
        {"num_layers": 1, "num_decoder_layers": 3},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_variants_of_the_model(fields: dict[str, Any]) -> None:
    modes: tuple[Recomputation, ...] = ("none", "full")
    for recomputation in modes:
        for precision in (torch.float32, torch.bfloat16):
            counted, seen = counted_and_seen(
                sentences(1, 130, 20), recomputation=recomputation, precision=precision, **fields
            )
            assert counted == pytest.approx(seen, rel=3e-3), (recomputation, precision)


def test_padded_rows_whose_masks_hide_tokens() -> None:
    batch = sentences(2, 192, 48)
    batch["attention_mask"] = torch.ones(2, 192).long()
    batch["attention_mask"][1, 120:] = 0
    counted, seen = counted_and_seen(batch)
    assert counted == pytest.approx(seen, rel=2e-3)


def test_a_classifier() -> None:
    config = SpadeT5Config.from_preset("tiny", vocab_size=100, num_labels=3)
    batch = {name: tensor for name, tensor in packed().items() if "decoder" not in name}
    batch["labels"] = torch.tensor([[0, 1, 2], [1, -100, -100]])
    model = SpadeT5ForSequenceClassification(config).train()
    counter = FlopsCounter(config, backend="torch", has_decoder=False)
    model(**batch)  # which fills the caches of the frozen state-space model
    seen = torch_flops(lambda: model(**batch).loss.backward())
    assert counter.batch(batch).executed == pytest.approx(seen, rel=2e-3)


@pytest.mark.parametrize("backend", ["torch", "naive", "triton"])
def test_is_more_than_the_model_needs(backend: str) -> None:
    config = SpadeT5Config.from_preset("tiny", vocab_size=100)
    flops = FlopsCounter(config, backend=backend).batch(packed())
    assert flops.executed > flops.model


def test_triton_multiplies_whole_tiles_of_what_is_in_the_window_and_the_documents() -> None:
    """A row of 256 tokens, window 31, tiles of 64 queries by 64 keys: the first and last tile of queries meet 2 tiles of keys, the others 3."""
    from spade_t5.kernels.local_attention.tile_counts import count_tiles

    arguments = {"d_kv": 64, "dtype": torch.bfloat16, "dropout_p": 0.0, "architecture": "sm_90"}
    whole = count_tiles(None, 2, 256, 31, 31, **arguments)
    assert whole.forward == 2 * (2 + 3 + 3 + 2) * 64 * 64
    ids = torch.ones(2, 256).long()
    ids[:, 64:128], ids[:, 128:] = 2, 0
    packed_rows = count_tiles(ids.numpy(), 2, 256, 31, 31, **arguments)
    assert packed_rows.forward == 2 * 2 * 64 * 64

"""Parity with Hugging Face's T5 1.1 and LongT5: equal logits and gradients, and conversion both ways."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.errors import ConfigError
from spade_t5.hf.conversion import (
    config_from_hf,
    config_to_hf,
    convert_checkpoint,
    key_table,
    model_from_hf,
    model_to_hf,
)

TOLERANCE = 1e-4  # of each tensor's largest entry, fp32
SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
}


def hf_model(family: str, *, tied: bool, scale: bool, feed_forward: str = "gated-gelu", radius: int = 5) -> nn.Module:
    torch.manual_seed(0)
    options = {**SIZES, "feed_forward_proj": feed_forward, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    options["tie_word_embeddings"] = scale  # what the constructors of both families take this argument for
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(**options))
    else:
        model = LongT5ForConditionalGeneration(LongT5Config(local_radius=radius, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(SIZES["vocab_size"], SIZES["d_model"]))
    assert model.config.scale_decoder_outputs is scale
    return model


def padded_batch(length: int, target_length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, SIZES["vocab_size"], (3, length), generator=generator)
    labels = torch.randint(2, SIZES["vocab_size"], (3, target_length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, length // 2 :] = 0
    attention_mask[2, : length // 3] = 0
    labels[1, target_length // 2 :] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert scale > 0.0, name
    assert error <= TOLERANCE * scale, f"{name}: {error} of {scale}"


def assert_parity(theirs: nn.Module, length: int, target_length: int = 9) -> None:
    ours = model_from_hf(theirs)
    batch = padded_batch(length, target_length)
    our_output, their_output = ours(**batch), theirs(**batch)
    is_target = batch["labels"] != -100
    assert_close(our_output.logits[is_target], their_output.logits[is_target], "logits")
    assert_close(our_output.loss, their_output.loss, "loss")
    is_token = batch["attention_mask"] == 1
    assert_close(
        our_output.encoder_last_hidden_state[is_token], their_output.encoder_last_hidden_state[is_token], "encoder"
    )
    our_output.loss.backward()
    their_output.loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = set()
    for our_name, their_name in key_table(ours.config).items():
        if our_name == "lm_head.weight" and ours.config.tie_word_embeddings:
            continue
        assert_close(ours.get_parameter(our_name).grad, their_gradients[their_name], our_name)
        compared.add(their_name)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert compared | copies == set(their_gradients) | copies
    assert {name for name, _ in ours.named_parameters()} == {
        ours_ for ours_, theirs_ in key_table(ours.config).items() if theirs_ in compared
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("length", [12, 150])
def test_t5_gives_the_same_logits_and_gradients(tied: bool, scale: bool, length: int) -> None:
    model = hf_model("t5", tied=tied, scale=scale)
    assert model_from_hf(model).config.tie_word_embeddings is tied
    assert_parity(model, length)


def test_t5_with_relu_gives_the_same_logits_and_gradients() -> None:
    assert_parity(hf_model("t5", tied=True, scale=True, feed_forward="relu"), 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(("length", "radius"), [(12, 5), (61, 5), (12, 40), (300, 140)])
def test_longt5_gives_the_same_logits_and_gradients(tied: bool, scale: bool, length: int, radius: int) -> None:
    assert_parity(hf_model("longt5", tied=tied, scale=scale, radius=radius), length)


@pytest.mark.parametrize("family", ["t5", "longt5"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_changes_no_weight(family: str, tied: bool) -> None:
    original = hf_model(family, tied=tied, scale=not tied)
    back = model_to_hf(model_from_hf(original))
    assert type(back) is type(original)
    assert (back.lm_head.weight is back.shared.weight) is tied
    assert back.config.scale_decoder_outputs is original.config.scale_decoder_outputs
    for name, weight in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize("family", ["t5", "longt5"])
@pytest.mark.parametrize("tied", [True, False])
def test_converted_folders_load_on_both_sides(tmp_path: Path, family: str, tied: bool) -> None:
    original = hf_model(family, tied=tied, scale=True).eval()
    original.save_pretrained(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    batch = padded_batch(20, 5)
    expected = original(**batch).logits
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back")
    assert isinstance(ours, SpadeT5ForConditionalGeneration)
    assert type(back) is type(original)
    assert_close(ours(**batch).logits[0], expected[0], "ours")
    assert_close(back(**batch).logits[0], expected[0], "back")


def test_configuration_round_trip() -> None:
    ours = SpadeT5Config(**SIZES, global_layers=[], local_attention="full", scale_decoder_outputs=True)
    back = config_from_hf(config_to_hf(ours), tie_word_embeddings=False)
    assert {**back.to_dict(), "transformers_version": None} == {**ours.to_dict(), "transformers_version": None}


def test_what_the_other_side_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_layers"):
        config_to_hf(SpadeT5Config(**SIZES))
    with pytest.raises(ConfigError, match="chunk"):
        config_to_hf(SpadeT5Config(**SIZES, global_layers=[], local_attention="chunk"))
    with pytest.raises(ConfigError, match="transient-global"):
        config_from_hf(LongT5Config(**SIZES, encoder_attention_type="transient-global"), tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="feed_forward_proj"):
        config_from_hf(T5Config(**SIZES, feed_forward_proj="gated-silu"), tie_word_embeddings=True)

"""A packed row gives each document the states, loss and gradients that it has alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification
from spade_t5.kernels.cross_attention import per_document
from spade_t5.modeling import SpadeT5PreTrainedModel

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}  # of each tensor's largest entry
SOURCE_LENGTHS = (37, 1, 23)
TARGET_LENGTHS = (7, 1, 12)
# three documents, two pads inside the row and three at its end; where each document starts
SOURCE_STARTS, SOURCE_ROW_TOKENS = (0, 37, 40), 66
TARGET_STARTS, TARGET_ROW_TOKENS = (0, 9, 10), 24

VARIANTS: dict[str, dict[str, object]] = {
    "window concat": {},
    "window add": {"fusion": "add"},
    "window stack": {"fusion": "stack"},
    "window gated": {"fusion": "gated"},
    "chunk concat": {"local_attention": "chunk"},
    "chunk add": {"local_attention": "chunk", "fusion": "add"},
    "chunk stack": {"local_attention": "chunk", "fusion": "stack"},
    "chunk gated": {"local_attention": "chunk", "fusion": "gated"},
    "full": {"local_attention": "full"},
    "s4 trained": {"ssm_training": "full"},
    "s4 trained chunk": {"ssm_training": "full", "local_attention": "chunk"},
    "s4d": {"global_mixer": "s4d", "ssm_training": "full"},
    "two global layers": {"global_layers": [0, 1]},
    "release traits": {
        "norm_placement": "post",
        "norm_type": "layer",
        "attention_scale": 0.35,
        "use_bias": True,
        "decoder_positions": 16,
        "embedding_norm": True,
        "final_norm": False,
        "encoder_bias_shared": False,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(autouse=True, params=["per document", "mask"])
def cross_attention_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both paths of cross-attention, of which short rows on a CPU would take the mask alone."""
    monkeypatch.setattr(per_document, "_SCORES_OF_A_CALL", -(10**6) if request.param == "per document" else 10**6)


def make_config(options: dict[str, object], **more: object) -> SpadeT5Config:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "local_radius": 6}
    return SpadeT5Config(**{**sizes, "d_state": 8, **options, **more})


def randomised(model: SpadeT5PreTrainedModel, dtype: torch.dtype) -> SpadeT5PreTrainedModel:
    """Norms and biases away from 1 and 0, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.requires_grad and not hasattr(parameter, "_is_ssm"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).train()


def row(pieces: list[Tensor], starts: tuple[int, ...], row_tokens: int, fill: int) -> tuple[Tensor, Tensor]:
    """One packed row of the pieces, and its segment ids."""
    tokens, segment_ids = torch.full((1, row_tokens), fill), torch.zeros(1, row_tokens, dtype=torch.long)
    for number, (piece, start) in enumerate(zip(pieces, starts, strict=True), 1):
        tokens[0, start : start + len(piece)] = piece
        segment_ids[0, start : start + len(piece)] = number
    return tokens, segment_ids


def documents(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 50, (length,), generator=generator) for length in lengths]


def gradients(model: SpadeT5PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def assert_close(packed: Tensor, alone: Tensor, name: str) -> None:
    scale = alone.abs().max().item()
    error = (packed - alone).abs().max().item()
    assert error <= TOLERANCES[alone.dtype] * scale, f"{name}: {error} of {scale}"


def assert_same_gradients(packed: dict[str, Tensor], alone: dict[str, Tensor], model: SpadeT5PreTrainedModel) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(packed) == set(alone) == trained
    for name, gradient in alone.items():
        if name.endswith(".k.bias"):  # shifts all scores of a query alike: its gradient is 0 but for rounding
            continue
        assert gradient.abs().max() > 0, f"{name}: no gradient"
        assert_close(packed[name], gradient, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_seq2seq(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = randomised(SpadeT5ForConditionalGeneration(make_config(VARIANTS[variant])), dtype)
    sources, targets = documents(SOURCE_LENGTHS, 1), documents(TARGET_LENGTHS, 2)

    def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    alone_states, alone_loss = [], torch.zeros((), dtype=dtype)
    for source, target in zip(sources, targets, strict=True):
        output = model(input_ids=source[None], labels=target[None])
        alone_states.append(output.encoder_last_hidden_state[0])
        alone_loss = alone_loss + summed_loss(output.logits, target[None])
    alone_loss.backward()
    alone_gradients = gradients(model)

    input_ids, segment_ids = row(sources, SOURCE_STARTS, SOURCE_ROW_TOKENS, fill=0)
    labels, decoder_segment_ids = row(targets, TARGET_STARTS, TARGET_ROW_TOKENS, fill=-100)
    output = model(input_ids=input_ids, labels=labels, segment_ids=segment_ids, decoder_segment_ids=decoder_segment_ids)
    packed_loss = summed_loss(output.logits, labels)
    packed_loss.backward()
    for number, states in enumerate(alone_states, 1):
        assert_close(output.encoder_last_hidden_state[segment_ids == number], states, f"document {number}")
    assert_close(packed_loss, alone_loss, "loss")
    assert_close(output.loss * sum(TARGET_LENGTHS), alone_loss, "mean loss")
    assert_same_gradients(gradients(model), alone_gradients, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", ["window concat", "chunk stack", "s4 trained", "release traits"])
@pytest.mark.parametrize("num_labels", [3, 1])
def test_classification(variant: str, num_labels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(VARIANTS[variant], num_labels=num_labels)
    model = randomised(SpadeT5ForSequenceClassification(config), dtype)
    sources = documents(SOURCE_LENGTHS, 1)
    labels = torch.tensor([[2, 0, 1]]) if num_labels > 1 else torch.tensor([[0.5, -1.0, 2.0]])
    alone = [model(input_ids=source[None], labels=labels[:, i]) for i, source in enumerate(sources)]
    alone_loss = sum(output.loss for output in alone) / len(sources)
    alone_loss.backward()
    alone_gradients = gradients(model)

    input_ids, segment_ids = row(sources, SOURCE_STARTS, SOURCE_ROW_TOKENS, fill=0)
    absent = torch.full((1, 1), -100 if num_labels > 1 else torch.nan)
    output = model(input_ids=input_ids, labels=torch.cat([labels, absent], dim=1), segment_ids=segment_ids)
    output.loss.backward()
    assert output.logits.shape == (1, 4, num_labels)
    assert_close(output.logits[0, :3], torch.cat([o.logits for o in alone]), "logits")
    assert_close(output.loss, alone_loss, "loss")
    assert_same_gradients(gradients(model), alone_gradients, model)


def test_classification_without_labels_has_a_column_for_every_document() -> None:
    model = SpadeT5ForSequenceClassification(make_config({}, num_labels=2))
    input_ids, segment_ids = row(documents(SOURCE_LENGTHS, 1), SOURCE_STARTS, SOURCE_ROW_TOKENS, fill=0)
    assert model(input_ids=input_ids, segment_ids=segment_ids).logits.shape == (1, 3, 2)
    with pytest.raises(ValueError, match="holds document 3"):
        model(input_ids=input_ids, segment_ids=segment_ids, labels=torch.tensor([[0, 1]]))


def test_padding_content_does_not_matter() -> None:
    torch.manual_seed(0)
    model = SpadeT5ForConditionalGeneration(make_config({})).eval()
    input_ids, segment_ids = row(documents(SOURCE_LENGTHS, 1), SOURCE_STARTS, SOURCE_ROW_TOKENS, fill=0)
    labels, decoder_segment_ids = row(documents(TARGET_LENGTHS, 2), TARGET_STARTS, TARGET_ROW_TOKENS, fill=-100)

    def logits(ids: Tensor) -> Tensor:
        output = model(input_ids=ids, labels=labels, segment_ids=segment_ids, decoder_segment_ids=decoder_segment_ids)
        return output.logits[decoder_segment_ids != 0]

    assert torch.equal(logits(input_ids), logits(input_ids.masked_fill(segment_ids == 0, 17)))


@pytest.mark.parametrize("attention", ["window", "chunk", "full"])
def test_an_unpacked_row_equals_a_padded_batch(attention: str) -> None:
    torch.manual_seed(0)
    model = SpadeT5ForConditionalGeneration(make_config({"local_attention": attention})).eval()
    source, target = documents((19,), 1)[0], documents((6,), 2)[0]
    padded = torch.cat([source, torch.tensor([5, 5, 5])])[None]
    alone = model(input_ids=source[None], labels=target[None])
    masked = model(input_ids=padded, attention_mask=(torch.arange(22) < 19).long()[None], labels=target[None])
    assert_close(masked.logits, alone.logits, "logits")


def refusals() -> dict[str, Callable[[SpadeT5ForConditionalGeneration], object]]:
    ids, ones = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    packed = torch.tensor([[1, 1, 2]])
    return {
        "disagree": lambda m: m(
            ids, torch.tensor([[1, 1, 0]]), labels=ids, segment_ids=packed, decoder_segment_ids=packed
        ),
        "decoder_segment_ids: packed rows": lambda m: m(ids, labels=ids, segment_ids=packed),
        "segment_ids: packed rows": lambda m: m(ids, labels=ids, decoder_segment_ids=packed),
        "use_cache": lambda m: m(
            ids, decoder_input_ids=ids, segment_ids=packed, decoder_segment_ids=packed, use_cache=True
        ),
        "generate: segment_ids": lambda m: m.generate(input_ids=ids, segment_ids=packed, max_new_tokens=2),
        "exactly one of input_ids": lambda m: m(labels=ids),
        "attention mask of shape": lambda m: m(ids, ones[None, None], labels=ids),
    }


@pytest.mark.parametrize("message", refusals())
def test_contradictions_are_refused(message: str) -> None:
    model = SpadeT5ForConditionalGeneration(make_config({}))
    with pytest.raises(ValueError, match=message):
        refusals()[message](model)


def test_segment_ids_and_an_agreeing_mask_are_accepted() -> None:
    model = SpadeT5ForConditionalGeneration(make_config({})).eval()
    ids, segment_ids = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 2, 0]])
    packed = {"segment_ids": segment_ids, "decoder_segment_ids": segment_ids}
    with_mask = model(ids, (segment_ids != 0).long(), labels=ids, **packed)
    assert torch.equal(with_mask.logits, model(ids, labels=ids, **packed).logits)

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.finetune.scoring import expected_values, generated_ids, label_log_likelihoods, padded

LABELS = [[5, 6, 1], [5, 1], [7, 8, 9, 1]]


@pytest.fixture(params=["t5", "spade_t5"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    if request.param == "t5":
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.1)).eval()
    return SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", **sizes, dropout_rate=0.1)).eval()


@pytest.fixture
def sources() -> tuple[Tensor, Tensor]:
    texts = [[11, 12, 13, 14, 1], [15, 16, 1], [17, 1]]
    return padded(texts, 0), padded([[1] * len(text) for text in texts], 0)


@torch.no_grad()
def brute_force(model: PreTrainedModel, input_ids: Tensor, label: list[int]) -> float:
    """log p(label | source), a token at a time, each from a forward pass of its own."""
    total = 0.0
    for t, token in enumerate(label):
        logits = model(input_ids=input_ids, decoder_input_ids=torch.tensor([[0, *label[:t]]])).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
    return total


def test_label_scores_are_the_brute_force_likelihoods(model: PreTrainedModel, sources: tuple[Tensor, Tensor]) -> None:
    input_ids, mask = sources
    scores = label_log_likelihoods(model, input_ids, mask, LABELS)
    assert scores.shape == (3, 3)
    for b in range(3):
        alone = input_ids[b : b + 1, : int(mask[b].sum())]
        for c, label in enumerate(LABELS):
            assert float(scores[b, c]) == pytest.approx(brute_force(model, alone, label), abs=1e-4)


def test_scores_of_all_continuations_sum_to_one(model: PreTrainedModel, sources: tuple[Tensor, Tensor]) -> None:
    scores = label_log_likelihoods(model, *sources, [[token] for token in range(32)])
    assert torch.allclose(scores.exp().sum(1), torch.ones(3), atol=1e-5)


def test_expected_value_weighs_candidates_by_likelihood() -> None:
    scores = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).log()
    assert expected_values(scores, [0.0, 4.0]).tolist() == pytest.approx([3.0, 0.0])


def test_generation_is_bounded_and_starts_after_the_source(
    model: PreTrainedModel, sources: tuple[Tensor, Tensor]
) -> None:
    greedy = generated_ids(model, *sources, max_target_tokens=4, num_beams=1)
    assert len(greedy) == 3
    assert all(len(ids) <= 5 for ids in greedy)  # the start token and four more
    # the first token is the most likely one under the same scores that rank label words
    first = label_log_likelihoods(model, *sources, [[token] for token in range(32)]).argmax(1)
    assert [ids[1] for ids in greedy] == first.tolist()


def test_padded_fills_up_on_the_right() -> None:
    assert padded([[1, 2, 3], [4]], -100).tolist() == [[1, 2, 3], [4, -100, -100]]

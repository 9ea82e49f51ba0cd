"""Summed losses against a hand-written formula, with absent labels and with none at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spade_t5.training.objectives import ClassificationObjective, Seq2SeqObjective


class Scores(nn.Module):
    """Gives fixed logits and remembers what it was called with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.inputs: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> SimpleNamespace:
        self.inputs = inputs
        return SimpleNamespace(logits=self.logits)


def test_seq2seq_sums_over_present_labels_and_shifts_them_right() -> None:
    labels = torch.tensor([[4, 2, 1, -100], [3, 1, -100, -100]])
    model = Scores(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)))
    objective = Seq2SeqObjective(decoder_start_token_id=5, pad_token_id=0)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": labels}
    loss = objective.summed_loss(model, batch)
    places = [(0, 0, 4), (0, 1, 2), (0, 2, 1), (1, 0, 3), (1, 1, 1)]
    expected = sum(torch.logsumexp(model.logits[b, t], 0) - model.logits[b, t, label] for b, t, label in places)
    torch.testing.assert_close(loss, expected)
    assert objective.num_targets(batch) == 5
    assert model.inputs["decoder_input_ids"].tolist() == [[5, 4, 2, 1], [5, 3, 1, 0]]
    assert "labels" not in model.inputs


def test_seq2seq_starts_every_document_of_a_packed_row() -> None:
    batch = {
        "input_ids": torch.ones(1, 4, dtype=torch.int64),
        "segment_ids": torch.tensor([[1, 1, 2, 0]]),
        "labels": torch.tensor([[4, 1, 3, 2, 1, -100]]),
        "decoder_segment_ids": torch.tensor([[1, 1, 2, 2, 2, 0]]),
    }
    model = Scores(torch.zeros(1, 6, 8))
    Seq2SeqObjective(decoder_start_token_id=7, pad_token_id=0).summed_loss(model, batch)
    assert model.inputs["decoder_input_ids"].tolist() == [[7, 4, 7, 3, 2, 0]]
    assert torch.equal(model.inputs["segment_ids"], batch["segment_ids"])


@pytest.mark.parametrize(
    ("objective", "logits", "labels"),
    [
        (Seq2SeqObjective(decoder_start_token_id=0, pad_token_id=0), torch.zeros(1, 2, 6), torch.full((1, 2), -100)),
        (ClassificationObjective(3), torch.zeros(1, 2, 3), torch.full((1, 2), -100)),
        (ClassificationObjective(1), torch.zeros(1, 2, 1), torch.full((1, 2), torch.nan)),
    ],
)
def test_a_batch_of_padding_weighs_nothing_and_has_a_gradient(objective: Any, logits: Tensor, labels: Tensor) -> None:
    model = Scores(logits)
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": labels}
    loss = objective.summed_loss(model, batch)
    loss.backward()
    assert objective.num_targets(batch) == 0
    assert float(loss.detach()) == 0.0
    assert model.logits.grad is not None
    assert not model.logits.grad.any()


def test_classification_of_several_documents_a_row() -> None:
    model = Scores(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)))
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.tensor([[2, 0], [1, -100]])}
    objective = ClassificationObjective(3)
    expected = sum(
        torch.logsumexp(model.logits[b, s], 0) - model.logits[b, s, label]
        for b, s, label in [(0, 0, 2), (0, 1, 0), (1, 0, 1)]
    )
    torch.testing.assert_close(objective.summed_loss(model, batch), expected)
    assert objective.num_targets(batch) == 3


def test_regression_is_a_squared_error() -> None:
    model = Scores(torch.tensor([[[1.0], [2.0]], [[5.0], [9.0]]]))
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.tensor([[0.5, 4.0], [5.0, torch.nan]])}
    objective = ClassificationObjective(1)
    assert float(objective.summed_loss(model, batch).detach()) == pytest.approx(0.25 + 4.0)
    assert objective.num_targets(batch) == 3

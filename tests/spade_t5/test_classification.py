"""The sequence classifier: its losses; packed rows are tested in `test_packed_rows.py`."""

import torch

from spade_t5 import SpadeT5Config, SpadeT5ForSequenceClassification


def make_model(num_labels: int) -> SpadeT5ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "local_radius": 4}
    return SpadeT5ForSequenceClassification(SpadeT5Config(**sizes, d_state=8, num_labels=num_labels)).eval()


def make_inputs() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(2, 64, (2, 21), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 18:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def test_loss_is_the_mean_over_present_labels() -> None:
    model, inputs = make_model(num_labels=3), make_inputs()
    logits = model(**inputs).logits
    loss = model(**inputs, labels=torch.tensor([2, -100])).loss
    torch.testing.assert_close(loss, -logits[0].log_softmax(-1)[2])


def test_regression_loss_is_the_mean_squared_error_of_present_labels() -> None:
    model, inputs = make_model(num_labels=1), make_inputs()
    logits = model(**inputs).logits
    loss = model(**inputs, labels=torch.tensor([1.5, torch.nan])).loss
    torch.testing.assert_close(loss, (logits[0, 0] - 1.5) ** 2)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_padding_does_not_count_in_the_mean() -> None:
    model, inputs = make_model(num_labels=3), make_inputs()
    alone = model(input_ids=inputs["input_ids"][1:, :18]).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone)

"""The model card, and an export that fails without leaving anything behind."""

from pathlib import Path
from typing import Any

import pytest

from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.export import export_run, model_card
from spade_t5.testing import documented
from spade_t5.training.reporting import METRICS_FILE

STATE: dict[str, Any] = {
    "step": 1200,
    "tokens": 3_400_000,
    "model_class": "SpadeT5ForSequenceClassification",
    "config": {
        "task": {"name": "sst2"},
        "mode": "encoder-head",
        "training": {"optimizer": {"name": "adamw", "learning_rate": 0.001}, "precision": "fp32"},
    },
    "initialised_from": "runs/pretrain",
    "provenance": {"torch": "2", "git_revision": None},
}


def test_model_card_tells_data_tokens_and_scores(tmp_path: Path) -> None:
    lines = [
        '{"step": 600, "split": "validation", "loss": 2.5}',
        '{"step": 1200, "split": "validation", "loss": 2.25}',
        '{"step": 1800, "split": "validation", "loss": 1.5}',
    ]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    (tmp_path / "scores.json").write_text('{"accuracy": 81.5}')
    card = model_card(STATE, tmp_path, 12_345_678)
    for text in (
        "12.3 M parameters",
        "AutoModelForSequenceClassification.from_pretrained",
        "steps: 1,200; input tokens seen: 3,400,000",
        '"task": {"name": "sst2"}',
        'objective: `"encoder-head"`',
        "initialised from: runs/pretrain",
        "held-out loss: 2.2500 nats per target at step 1,200",
        '"accuracy": 81.5',
    ):
        assert text in card


def test_model_card_of_a_run_whose_last_evaluation_overflowed(tmp_path: Path) -> None:
    lines = [
        '{"step": 600, "split": "validation", "loss": 2.5}',
        '{"step": 1200, "split": "validation", "loss": null}',
    ]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines) + "\n")
    assert "- held-out loss: not finite at step 1,200" in model_card(STATE, tmp_path, 1)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_model_card_of_a_run_with_broken_scores(content: str, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        DataError, match=r"scores\.json: is no JSON object; remove it, or score the run again"
    ) as caught:
        model_card(STATE, tmp_path, 1)
    documented(str(caught.value))


def test_model_card_of_a_run_without_metrics(tmp_path: Path) -> None:
    pretrained = {**STATE, "model_class": "SpadeT5ForConditionalGeneration", "initialised_from": None}
    card = model_card(pretrained, tmp_path, 1_000_000)
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "held-out loss" not in card
    assert "## Scores" not in card
    assert "initialised from" not in card


@pytest.mark.parametrize("size", ["big", "5", "0GB", "5 GB", "-1MB"])
def test_a_shard_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-shard-size: "):
        export_run(tmp_path, tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())

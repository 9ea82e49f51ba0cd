"""Scores against the same libraries, computed anew from the saved predictions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from transformers import PreTrainedTokenizerFast

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification
from spade_t5.config import from_mapping
from spade_t5.errors import ConfigError, DataError
from spade_t5.finetune.config import EvaluateConfig
from spade_t5.finetune.evaluate import EvaluationConfig, evaluate_model, saved_class, score_lines
from spade_t5.finetune.rows import RowsConfig
from spade_t5.finetune.task import Task

TINY = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "local_radius": 3,
}
WORDS = [
    "mrpc",
    "stsb",
    "rte",
    "summarize:",
    "sentence1:",
    "sentence2:",
    "it",
    "rained",
    "snowed",
    ".",
    "we",
    "won",
    "lost",
]
ANSWERS = ["equivalent", "not_equivalent", "entailment", "not_entailment", *(f"{i / 5:.1f}" for i in range(26))]
TEXTS = ["it rained .", "it snowed .", "we won .", "we lost .", "it rained . we won ."]


@pytest.fixture
def folders(tmp_path: Path, word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]) -> dict[str, Path]:
    """Random models with and without a head, and thirty rows of every task."""
    pairs = [(TEXTS[i % 5], TEXTS[i // 2 % 5]) for i in range(30)]
    tables = {
        "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", [f"{int(a == b)}\t1\t2\t{a}\t{b}" for a, b in pairs]),
        "RTE": (
            "index\tsentence1\tsentence2\tlabel",
            [f"{i}\t{a}\t{b}\t{'' if a == b else 'not_'}entailment" for i, (a, b) in enumerate(pairs)],
        ),
        "STS-B": (
            "index\tsentence1\tsentence2\tscore",
            [f"{i}\t{a}\t{b}\t{i % 11 / 2.2:.3f}" for i, (a, b) in enumerate(pairs)],
        ),
    }
    for name, (header, rows) in tables.items():
        (tmp_path / "glue" / name).mkdir(parents=True)
        for file in ("train.tsv", "dev.tsv"):
            (tmp_path / "glue" / name / file).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    documents = [{"document": f"{a} {b}", "summary": f"{a}\n{b}"} for a, b in pairs]
    (tmp_path / "summaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    tokenizer = word_tokenizer([*WORDS, *ANSWERS])
    torch.manual_seed(0)
    for name, num_labels in (("generator", 2), ("classifier", 2), ("regressor", 1)):
        cls = SpadeT5ForConditionalGeneration if name == "generator" else SpadeT5ForSequenceClassification
        cls(SpadeT5Config.from_preset("tiny", vocab_size=128, **TINY, num_labels=num_labels)).save_pretrained(
            tmp_path / name
        )
        tokenizer.save_pretrained(tmp_path / name)
    return {
        name: tmp_path / name for name in ("glue", "summaries.jsonl", "generator", "classifier", "regressor", "out")
    }


def task(folders: dict[str, Path], name: str) -> Task:
    path = str(folders["summaries.jsonl"])
    source: dict[str, Any] = {"name": "folder", "path": str(folders["glue"])}
    if name == "summarization":
        source = {"name": "files", "train": path, "validation": path}
    return from_mapping(EvaluateConfig, {"task": {"name": name, "source": source}}).task.build()


def recomputed(name: str, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    if name == "stsb":
        return {
            "pearson": 100 * pearsonr(predictions, references)[0],
            "spearman": 100 * spearmanr(predictions, references)[0],
        }
    if name == "summarization":
        kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = RougeScorer(kinds, use_stemmer=True)
        pairs = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
        return {kind: 100 * sum(pair[kind].fmeasure for pair in pairs) / len(pairs) for kind in kinds}
    accuracy = {"accuracy": 100 * accuracy_score(references, predictions)}
    return accuracy if name == "rte" else {"f1": 100 * f1_score(references, predictions), **accuracy}


@pytest.mark.parametrize(
    ("name", "model", "method"),
    [
        ("mrpc", "generator", "likelihood"),
        ("mrpc", "classifier", "head"),
        ("rte", "generator", "likelihood"),
        ("rte", "classifier", "head"),
        ("stsb", "generator", "likelihood"),
        ("stsb", "regressor", "head"),
        ("summarization", "generator", "generate"),
    ],
)
def test_scores_equal_those_of_the_saved_predictions(
    folders: dict[str, Path], name: str, model: str, method: str
) -> None:
    # a random model is enough: the scores must be right, not high
    rows = RowsConfig(max_target_tokens=8)
    scores = evaluate_model(
        folders[model], task(folders, name), config=EvaluationConfig(), rows=rows, out=folders["out"]
    )
    lines = (folders["out"] / "predictions" / f"{name}-validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == scores["num_examples"] == 30
    assert scores["method"] == method
    predictions, references = ([record[key] for record in records] for key in ("prediction", "reference"))
    assert scores["metrics"] == pytest.approx(recomputed(name, predictions, references), abs=1e-9)
    assert scores["average"] == pytest.approx(sum(scores["metrics"].values()) / len(scores["metrics"]))
    assert json.loads((folders["out"] / "scores.json").read_text(encoding="utf-8")) == scores
    assert len(score_lines(scores)) == 2 + len(scores["notes"])
    assert not list(folders["out"].rglob("*.partial"))
    if name == "stsb":
        assert scores["baseline"]["metrics"] == {"pearson": 0, "spearman": 0}
        assert len(scores["baseline"]["notes"]) == 2
    if name == "summarization":
        assert scores["baseline"]["metrics"]["rouge1"] > 40  # the first three sentences of a document hold its summary


def test_batches_do_not_change_predictions(folders: dict[str, Path]) -> None:
    outcomes = []
    for batch_tokens in (1, 40, 100_000):
        config = EvaluationConfig(batch_tokens=batch_tokens)
        evaluate_model(
            folders["generator"], task(folders, "mrpc"), config=config, rows=RowsConfig(), out=folders["out"]
        )
        lines = (folders["out"] / "predictions" / "mrpc-validation.jsonl").read_text(encoding="utf-8").splitlines()
        outcomes.append([list(json.loads(line)["scores"].values()) for line in lines])
    assert torch.allclose(torch.tensor(outcomes[0]), torch.tensor(outcomes[1]), atol=1e-4)
    assert torch.allclose(torch.tensor(outcomes[0]), torch.tensor(outcomes[2]), atol=1e-4)


def test_generated_texts_outside_the_labels_are_counted(folders: dict[str, Path]) -> None:
    config = EvaluationConfig(method="generate", max_examples=7)
    scores = evaluate_model(
        folders["generator"], task(folders, "mrpc"), config=config, rows=RowsConfig(max_target_tokens=3)
    )
    assert scores["num_examples"] == 7
    assert scores["notes"] == ["7 of 7 generated texts are no label of the task"]
    assert scores["metrics"] == {"f1": 0, "accuracy": 0}


def test_a_head_for_another_task_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="task stsb: needs a head of 1 outputs, the model has 2"):
        evaluate_model(folders["classifier"], task(folders, "stsb"), config=EvaluationConfig(), rows=RowsConfig())
    with pytest.raises(ConfigError, match="summarization generates text: use mode text-to-text"):
        evaluate_model(
            folders["classifier"], task(folders, "summarization"), config=EvaluationConfig(), rows=RowsConfig()
        )


def test_nothing_is_written_when_the_data_is_wrong(folders: dict[str, Path]) -> None:
    with (folders["glue"] / "MRPC" / "dev.tsv").open("a", encoding="utf-8") as file:
        file.write("2\t1\t2\ta\tb\n")
    with pytest.raises(DataError, match=r"dev.tsv line 32: label '2' is outside the task mrpc"):
        evaluate_model(
            folders["generator"],
            task(folders, "mrpc"),
            config=EvaluationConfig(),
            rows=RowsConfig(),
            out=folders["out"],
        )
    assert not folders["out"].exists()


def test_the_saved_class_decides_how_a_model_answers(folders: dict[str, Path]) -> None:
    assert saved_class(folders["generator"]) == "SpadeT5ForConditionalGeneration"
    assert saved_class(folders["regressor"]) == "SpadeT5ForSequenceClassification"

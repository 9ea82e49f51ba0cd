import math

import pytest

from spade_t5.finetune.metrics import METRICS, baseline, compute, sentence_per_line
from spade_t5.finetune.task import Example, Task


def make_task(**values: object) -> Task:
    defaults = {
        "name": "toy",
        "kind": "classification",
        "splits": {"train": list},
        "to_example": lambda row: Example(source="", target="", reference=0),
        "metrics": ("accuracy",),
        "label_words": ("no", "yes"),
        "max_source_tokens": 8,
        "max_target_tokens": 8,
    }
    return Task(**{**defaults, **values})


def example(reference: object, source: str = "") -> Example:
    return Example(source=source, target="", reference=reference)


def test_classification_metrics_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    references = [1, 1, 0, 1, 0, 0, 1, 0, 1, 1]
    predictions = [1, 0, 0, 1, 1, 0, 1, 0, 1, 0]
    values = compute(["accuracy", "f1", "f1_macro", "matthews"], predictions, references).values
    assert values["accuracy"] == 100 * accuracy_score(references, predictions) == 70
    assert values["f1"] == 100 * f1_score(references, predictions)
    assert values["f1_macro"] == 100 * f1_score(references, predictions, average="macro")
    assert values["matthews"] == pytest.approx(100 * matthews_corrcoef(references, predictions), abs=1e-12)


def test_text_outside_the_label_words_is_wrong_and_never_positive() -> None:
    # two of three positives found, no false positive: precision 1, recall 2/3
    values = compute(["accuracy", "f1"], [1, 1, -1, -1], [1, 1, 1, 0]).values
    assert values["accuracy"] == 50
    assert values["f1"] == pytest.approx(80)


def test_correlations_are_scipys() -> None:
    from scipy.stats import pearsonr, spearmanr

    references, predictions = [0.0, 1.5, 2.0, 4.2, 5.0], [0.2, 1.0, 3.0, 2.8, 4.4]
    values = compute(["pearson", "spearman"], predictions, references).values
    assert values["pearson"] == 100 * pearsonr(predictions, references)[0]
    assert values["spearman"] == 100 * spearmanr(predictions, references)[0]
    assert values["spearman"] == pytest.approx(90)  # one neighbouring pair of five exchanged: 1 - 6 * 2 / (5 * 24)


@pytest.mark.parametrize("name", ["pearson", "spearman", "matthews"])
def test_undefined_values_are_zero_with_a_note(name: str) -> None:
    scores = compute([name], [1, 1, 1], [0, 1, 1])
    assert scores.values == {name: 0.0}
    assert name in scores.notes[0]
    assert compute([name], [0, 1, 1], [0, 1, 1]).notes == []


def test_rouge_is_rouge_scores_mean() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    references = ["the cats sat .\na dog barked .", "rain is expected ."]
    predictions = ["a dog barked .\nthe cat sits .", "rain expected today ."]
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(names, use_stemmer=True)
    pairs = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    values = compute(names, predictions, references).values
    for name in names:
        assert values[name] == pytest.approx(100 * sum(pair[name].fmeasure for pair in pairs) / 2, abs=1e-12)
    assert values["rougeLsum"] > values["rougeL"]  # the sentences stand in another order


def test_exact_match_ignores_blanks_at_the_ends() -> None:
    assert compute(["exact_match"], ["yes ", "No", "maybe"], ["yes", "no", "maybe"]).values[
        "exact_match"
    ] == pytest.approx(200 / 3)


@pytest.mark.parametrize("name", METRICS)
def test_perfect_predictions_score_100(name: str) -> None:
    references: list[object] = [0, 1, 1, 0] if name in ("accuracy", "f1", "f1_macro", "matthews") else [0.5, 1.0, 3.0]
    if name.startswith("rouge") or name == "exact_match":
        references = ["it rained .\nit stopped .", "the end ."]
    assert compute([name], references, references).values[name] == pytest.approx(100)


def test_average_is_the_mean_of_a_tasks_metrics() -> None:
    scores = compute(["accuracy", "f1"], [1, 1, 0, 0], [1, 0, 0, 0])
    assert scores.average == pytest.approx((75 + 200 / 3) / 2)


def test_numbers_of_predictions_and_references_must_agree() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        compute(["accuracy"], [1, 0], [1])
    with pytest.raises(ValueError, match="0 predictions"):
        compute(["accuracy"], [], [])


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("It rained . The match went on .", ["It rained .", "The match went on ."]),
        ('He said "stop." Then he left! Why? 3 reasons.', ['He said "stop."', "Then he left!", "Why?", "3 reasons."]),
        ("one line\n\nanother line ", ["one line", "another line"]),
        ("version 3.5 of a. b", ["version 3.5 of a. b"]),
        ("", [""]),
    ],
)
def test_sentences_stand_on_lines_of_their_own(text: str, lines: list[str]) -> None:
    assert sentence_per_line(text).split("\n") == lines
    assert sentence_per_line("\n".join(lines)).split("\n") == lines


def test_majority_baseline_comes_from_the_training_rows() -> None:
    result = baseline(
        make_task(), [example(1), example(1), example(0)], [example(0), example(0), example(1), example(0)]
    )
    assert result is not None
    assert result.scores.values == {"accuracy": 25}
    assert "'yes'" in result.rule
    tie = baseline(make_task(), [example(1), example(0)], [example(0)])
    assert tie is not None
    assert tie.scores.values == {"accuracy": 100}


def test_mean_baseline_has_no_correlation() -> None:
    task = make_task(kind="regression", metrics=("pearson", "spearman"))
    result = baseline(task, [example(1.0), example(4.0)], [example(0.0), example(5.0)])
    assert result is not None
    assert result.scores.values == {"pearson": 0, "spearman": 0}
    assert "2.500" in result.rule


def test_lead_baseline_takes_the_first_sentences_of_the_document() -> None:
    task = make_task(
        kind="generation", label_words=(), metrics=("exact_match",), prompt="summarize: ", lead_sentences=2
    )
    rows = [example("A b.\nC d.", "summarize: A b. C d. E f.")]
    result = baseline(task, [], rows)
    assert result is not None
    assert result.scores.values == {"exact_match": 100}
    assert baseline(make_task(kind="generation", lead_sentences=0), [], rows) is None


def test_nan_never_leaves_compute() -> None:
    assert all(math.isfinite(value) for value in compute(["pearson", "spearman"], [1.0], [1.0]).values.values())

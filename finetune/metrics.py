"""Scores as the field prints them: numbers from 0 to 100 computed by scikit-learn, scipy and rouge-score.

A metric is a function of predictions and references. Undefined values, such as the correlation of constant predictions,
become 0 with a note, so that a collapsed model has a score and its reason. Averages of GLUE and the trivial baselines that
every score is shown beside (majority class, mean value, leading sentences) are here too.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from spade_t5.finetune.task import Example, Prediction, Task

# A sentence ends at . ! ? (quotes and brackets may follow); the next one begins with a capital, a digit or an opening mark.
SENTENCE_BREAK = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[`]*[A-Z0-9])")


@dataclass(slots=True)
class Scores:
    """Values of a task's metrics on one set of predictions."""

    values: dict[str, float] = field(default_factory=dict)
    """Metric name to value, 0-100."""
    notes: list[str] = field(default_factory=list)
    """One line for every value that is not what the formula gave."""

    @property
    def average(self) -> float:
        """Mean of the metrics: the single number GLUE gives a task with several metrics."""
        return fmean(self.values.values())


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Share of predictions that equal their reference."""
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(references, predictions))


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """F1 of class 1; every other prediction, one outside the label words included, counts as not class 1."""
    from sklearn.metrics import f1_score

    positive = [reference == 1 for reference in references]
    return 100 * float(f1_score(positive, [prediction == 1 for prediction in predictions], zero_division=0))


def f1_macro(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Mean over the classes among the references of each class's F1."""
    from sklearn.metrics import f1_score

    labels = sorted(set(references))
    return 100 * float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0))


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Matthews correlation, nan if predictions or references are constant."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return math.nan
    return 100 * float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Pearson correlation, nan if predictions or references are constant or fewer than two."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Spearman rank correlation, nan if predictions or references are constant or fewer than two."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of texts equal to their reference but for blanks at the ends."""
    return 100 * fmean(
        prediction.strip() == reference.strip() for prediction, reference in zip(predictions, references, strict=True)
    )


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-1 F-measure with Porter stemming, mean over the texts."""
    return _rouge("rouge1", predictions, references)


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-2 F-measure with Porter stemming, mean over the texts."""
    return _rouge("rouge2", predictions, references)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L F-measure (longest common subsequence of the whole texts) with Porter stemming, mean over the texts."""
    return _rouge("rougeL", predictions, references)


def rouge_lsum(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-Lsum F-measure (union of sentence-level subsequences; a line is a sentence) with stemming, mean over the texts."""
    return _rouge("rougeLsum", predictions, references)


METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "exact_match": exact_match,
    "rouge1": rouge1,
    "rouge2": rouge2,
    "rougeL": rouge_l,
    "rougeLsum": rouge_lsum,
}


def compute(names: Sequence[str], predictions: Sequence[Prediction], references: Sequence[Prediction]) -> Scores:
    """Every named metric of the predictions.

    Args:
        names: keys of `METRICS`.
        predictions: class indices, values or texts, as the metrics expect.
        references: the right answers, in the order of the predictions.

    Raises:
        ValueError: no predictions, or another number of references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: need as many, and at least one"
        )
    scores = Scores()
    for name in names:
        value = METRICS[name](predictions, references)
        if not math.isfinite(value):
            scores.notes.append(f"{name} is undefined (predictions or references are constant): counted as 0")
            value = 0.0
        scores.values[name] = value
    return scores


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a model must beat."""

    rule: str
    """How it predicts, in words."""
    scores: Scores


def baseline(task: Task, train: Sequence[Example], evaluated: Sequence[Example]) -> Baseline | None:
    """Scores of the trivial prediction: majority class, mean value, or the leading sentences of the document.

    Args:
        task: names the metrics and the kind of prediction.
        train: examples the majority and the mean are taken from.
        evaluated: examples to score.

    Returns:
        None for a generation task without a lead rule.
    """
    prediction: Prediction
    if task.kind == "classification":
        # among equally frequent classes the smallest index, so that the result does not depend on the order of rows
        counts = Counter(example.reference for example in train)
        prediction = min(counts, key=lambda label: (-counts[label], label))
        rule = f"always {task.label_words[int(prediction)]!r}, the majority of the training rows"
        predictions = [prediction] * len(evaluated)
    elif task.kind == "regression":
        prediction = fmean(float(example.reference) for example in train)
        rule = f"always {prediction:.3f}, the mean of the training rows"
        predictions = [prediction] * len(evaluated)
    elif task.lead_sentences:
        count = task.lead_sentences
        rule = f"the first {count} sentences of the document" if count > 1 else "the first sentence of the document"
        documents = [example.source.removeprefix(task.prompt) for example in evaluated]
        predictions = ["\n".join(sentence_per_line(document).split("\n")[:count]) for document in documents]
    else:
        return None
    return Baseline(rule, compute(task.metrics, predictions, [example.reference for example in evaluated]))


def sentence_per_line(text: str) -> str:
    r"""The text with one sentence on each line, as ROUGE-Lsum reads it.

    >>> sentence_per_line("It rained . The match (in Bonn) went on! 3-1.")
    'It rained .\nThe match (in Bonn) went on!\n3-1.'
    """
    lines = (line.strip() for line in SENTENCE_BREAK.sub("\n", text).split("\n"))
    return "\n".join(line for line in lines if line)


def _correlation(
    function: Callable[..., tuple[float, float]], predictions: Sequence[float], references: Sequence[float]
) -> float:
    if len(predictions) < 2 or len(set(predictions)) == 1 or len(set(references)) == 1:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input: scipy warns, the value is reported all the same
        return 100 * float(function(predictions, references)[0])


def _rouge(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    return 100 * fmean(scorer.score(reference, prediction)[name].fmeasure for reference, prediction in pairs)

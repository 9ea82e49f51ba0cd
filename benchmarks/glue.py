"""`mini` fine-tuned from scratch on GLUE: the shipped recipes, scored on the whole development sets.

    spade-t5 bench glue --glue GLUE [--runs runs/glue] [--out docs/results]

GLUE is the folder of the original download. Each recipe gets a tokenizer trained on its own training text. Runs that are finished in
--runs are not done again, so the campaign can be interrupted. Every score is computed a second time from the saved predictions, by
scikit-learn or SciPy directly, and must be equal.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from spade_t5.benchmarks import report, script
from spade_t5.config import apply_overrides, from_mapping, read_yaml
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.run import finetune
from spade_t5.pretrain.corpora import FilesCorpus
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer
from spade_t5.training.reporting import read_metrics

# Recipe -> folder in GLUE, text columns of the training table, pieces of the tokenizer.
RECIPES: dict[str, tuple[str, str, int]] = {
    "sst2-text": ("SST-2", "sentence", 8000),
    "sst2-encoder": ("SST-2", "sentence", 8000),
    "mrpc": ("MRPC", "#1 String", 4000),
    "stsb": ("STS-B", "sentence1", 4000),
    "rte": ("RTE", "sentence1", 4000),
}
SCORES = {
    "accuracy": lambda predictions, references: accuracy_score(references, predictions),
    "f1": lambda predictions, references: f1_score(references, predictions),
    "pearson": lambda predictions, references: pearsonr(predictions, references).statistic,
    "spearman": lambda predictions, references: spearmanr(predictions, references).statistic,
}


def run_recipe(recipe: str, glue: Path, run_dir: Path) -> None:
    """Trains the tokenizer and the model of a recipe, unless they are there."""
    folder, column, vocab_size = RECIPES[recipe]
    tokenizer = run_dir.parent / f"{folder}-tokenizer"
    if not tokenizer.exists():
        table = next((glue / folder).glob("train.tsv*"))
        corpus = FilesCorpus(paths=(str(table),), text_field=column)
        train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=vocab_size, num_sentinels=100, out=tokenizer))
    settings = [f"run_dir={run_dir}", f"tokenizer={tokenizer}", "task.source.name=folder", f"task.source.path={glue}"]
    if not (run_dir / "scores.json").exists():
        shipped = Path(str(files("spade_t5") / "configs" / "finetune" / f"{recipe}.yaml"))
        finetune(from_mapping(FinetuneConfig, apply_overrides(read_yaml(shipped), settings)))


def collect(run_dir: Path) -> dict[str, Any]:
    """What a finished run reached, with its scores computed again from the predictions.

    Raises:
        AssertionError: a score differs from the one computed again.
    """
    scores = json.loads((run_dir / "scores.json").read_text(encoding="utf-8"))
    saved = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    saved.pop("tokenizer_hash")
    config = from_mapping(FinetuneConfig, apply_overrides(saved, []))
    path = run_dir / "predictions" / f"{scores['task']}-{scores['split']}.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    predictions, references = ([record[key] for record in records] for key in ("prediction", "reference"))
    again = {name: 100 * float(SCORES[name](predictions, references)) for name in scores["metrics"]}
    for name, value in scores["metrics"].items():
        assert abs(value - again[name]) < 1e-9, f"{run_dir}: {name} is {value}, computed again {again[name]}"
    train = [metrics for metrics in read_metrics(run_dir) if metrics["split"] == "train"]
    return {
        "mode": config.mode,
        "model": config.model,
        "metrics": scores["metrics"],
        "metrics_from_predictions": again,
        "baseline": scores["baseline"],
        "method": scores["method"],
        "num_examples": scores["num_examples"],
        "epochs": config.epochs,
        "steps": train[-1]["step"],
        "training_seconds": sum(metrics["seconds"] for metrics in train),
        "notes": scores["notes"],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--glue", type=Path, required=True, help="folder of the original GLUE download")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/glue"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of glue.json")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")


def run(options: argparse.Namespace) -> None:
    """Runs what is missing, prints a table, writes glue.json."""
    options.runs.mkdir(parents=True, exist_ok=True)
    results = {}
    for recipe in options.recipes:
        run_recipe(recipe, options.glue, options.runs / recipe)
        results[recipe] = collect(options.runs / recipe)
        print(recipe, results[recipe]["metrics"], "baseline", results[recipe]["baseline"]["metrics"])
    print(report.write("glue", {"dtype": "float32", "recipes": results}, options.out))


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)

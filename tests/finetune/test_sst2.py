"""The SST-2 recipes on the real data, cut to 200 short steps: `mini` from scratch must be on its way."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score

from spade_t5.config import apply_overrides, from_mapping, read_yaml
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.finetune.run import finetune
from spade_t5.pretrain.corpora import FilesCorpus
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer
from spade_t5.testing import dev_data
from spade_t5.training.reporting import read_metrics


@pytest.mark.dev_data
@pytest.mark.parametrize("recipe", ["sst2-text", "sst2-encoder"])
def test_two_hundred_steps_of_sst2_beat_the_majority(tmp_path: Path, recipe: str) -> None:
    glue = dev_data() / "glue"
    corpus = FilesCorpus(paths=(str(glue / "SST-2" / "train.tsv.gz"),), text_field="sentence")
    train_tokenizer(TokenizerConfig(corpus=corpus, vocab_size=8000, num_sentinels=100, out=tmp_path / "tokenizer"))
    words = [
        f"run_dir={tmp_path / 'run'}",
        "task.source.name=folder",
        f"task.source.path={glue}",
        f"tokenizer={tmp_path / 'tokenizer'}",
        "training.steps=200",
    ]
    path = Path(str(files("spade_t5") / "configs" / "finetune" / f"{recipe}.yaml"))
    run = finetune(from_mapping(FinetuneConfig, apply_overrides(read_yaml(path), words)))
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    lines = (run / "predictions" / "sst2-validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 872
    pairs = [(record["reference"], record["prediction"]) for record in records]
    assert scores["metrics"]["accuracy"] == 100 * accuracy_score(*zip(*pairs, strict=True))
    assert scores["metrics"]["accuracy"] > scores["baseline"]["metrics"]["accuracy"] + 8
    held_out = [metrics["loss"] for metrics in read_metrics(run) if metrics["split"] == "validation"]
    assert held_out[-1] < held_out[0] or len(held_out) == 1

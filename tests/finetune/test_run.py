"""A whole fine-tuning run of a very small model, in both modes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification
from spade_t5.config import dump_yaml, from_mapping, to_mapping
from spade_t5.errors import ConfigError, DataError
from spade_t5.finetune.config import FinetuneConfig, evaluate_config
from spade_t5.finetune.evaluate import evaluate_model
from spade_t5.finetune.rows import EncodedExamples, ExampleRows
from spade_t5.finetune.run import bounded_by_epochs, finetune
from spade_t5.testing import documented, torchrun
from spade_t5.training import ClassificationObjective, Seq2SeqObjective, TrainingConfig
from spade_t5.training.schedules import WSDSchedule

TINY = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 16,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "local_radius": 3,
}


def config(opinions: dict[str, Path], run_dir: Path, **values: Any) -> FinetuneConfig:
    mapping = {
        "run_dir": str(run_dir),
        "task": {"name": "sst2", "source": {"name": "folder", "path": str(opinions["glue"])}},
        "model": {"preset": "tiny", **TINY},
        "tokenizer": str(opinions["tokenizer"]),
        "dropout_rate": 0.0,
        "rows": {"row_tokens": 64},
        "epochs": 12,
        "training": {
            "steps": 1000,
            "global_batch_rows": 8,
            "micro_batch_rows": 8,
            "optimizer": {"name": "adamw", "learning_rate": 5e-3},
            "schedule": {"name": "linear", "warmup_steps": 5},
        },
    }
    return from_mapping(FinetuneConfig, {**mapping, **values})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mode", ["text-to-text", "encoder-head"])
def test_a_tiny_model_learns_and_its_scores_follow_from_its_predictions(
    opinions: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    run = finetune(config(opinions, tmp_path / "run", mode=mode))
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    records = read(run / "predictions" / "sst2-validation.jsonl")
    assert [record["row"] for record in records] == list(range(61))
    predictions, references = ([record[key] for record in records] for key in ("prediction", "reference"))
    assert scores["metrics"]["accuracy"] == 100 * accuracy_score(references, predictions)
    assert scores["metrics"]["accuracy"] > 90
    assert scores["baseline"]["metrics"]["accuracy"] < 55
    words = ["negative", "positive"]
    assert all(max(record["scores"], key=record["scores"].get) == words[record["prediction"]] for record in records)

    # the export alone, in Hugging Face's hands, gives the same answer
    auto = AutoModelForSeq2SeqLM if mode == "text-to-text" else AutoModelForSequenceClassification
    model, tokenizer = auto.from_pretrained(run / "model").eval(), AutoTokenizer.from_pretrained(run / "model")
    inputs = tokenizer(["sst2 sentence: the film good", "sst2 sentence: a dull plot"], return_tensors="pt")
    if mode == "text-to-text":
        texts = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=4), skip_special_tokens=True)
    else:
        texts = [model.config.id2label[i] for i in model(**inputs).logits.argmax(1).tolist()]
    assert texts == ["positive", "negative"]

    # and so do the run, its checkpoint and the export, each evaluated again with the run's own settings
    for path in (run, next((run / "checkpoints").iterdir())):
        again = evaluate_config(path, None, [])
        assert evaluate_model(path, again.task.build(), config=again.evaluation, rows=again.rows) == scores
    words_of_source = ["task.source.name=folder", f"task.source.path={opinions['glue']}", "rows.row_tokens=64"]
    exported = evaluate_config(run / "model", "sst2", words_of_source)
    assert (
        evaluate_model(run / "model", exported.task.build(), config=exported.evaluation, rows=exported.rows) == scores
    )


def test_generation_answers_too(opinions: dict[str, Path], tmp_path: Path) -> None:
    run = finetune(
        config(opinions, tmp_path / "run", evaluation={"method": "generate", "num_beams": 2, "max_examples": 20})
    )
    records = read(run / "predictions" / "sst2-validation.jsonl")
    assert len(records) == 20
    assert {record["text"] for record in records} == {"negative", "positive"}
    assert all(["negative", "positive"].index(record["text"]) == record["prediction"] for record in records)


def test_a_run_that_goes_on_equals_an_unbroken_one(opinions: dict[str, Path], tmp_path: Path) -> None:
    exports = {}
    for name, stages in (("broken", (7, 15)), ("unbroken", (15,))):
        for steps in stages:
            training = {
                "steps": steps,
                "global_batch_rows": 8,
                "micro_batch_rows": 4,
                "optimizer": {"name": "adamw", "learning_rate": 1e-2},
            }
            run = finetune(config(opinions, tmp_path / name, dropout_rate=0.1, training=training, epochs=None))
            exports[name, steps] = SpadeT5ForConditionalGeneration.from_pretrained(run / "model").state_dict()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    finetune(config(opinions, run, dropout_rate=0.1, training=training, epochs=None))  # it is finished
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()} == before
    last = exports["unbroken", 15]
    assert all(torch.equal(last[key], exports["broken", 15][key]) for key in last)
    assert not torch.equal(last["lm_head.weight"], exports["broken", 7]["lm_head.weight"])


def test_a_run_that_was_cut_off_behind_its_last_step_makes_up_for_it(opinions: dict[str, Path], tmp_path: Path) -> None:
    run = finetune(config(opinions, tmp_path / "run", epochs=1))
    scores = (run / "scores.json").read_bytes()
    (run / "scores.json").unlink()
    shutil.rmtree(run / "model")
    finetune(config(opinions, tmp_path / "run", epochs=1))
    assert (run / "scores.json").read_bytes() == scores
    SpadeT5ForConditionalGeneration.from_pretrained(run / "model")


def test_other_rows_are_refused_at_a_resume(opinions: dict[str, Path], tmp_path: Path) -> None:
    glue = shutil.copytree(opinions["glue"], tmp_path / "moved")
    task = {"name": "sst2", "source": {"name": "folder", "path": str(glue)}}
    settings = config(opinions, tmp_path / "run", epochs=1)
    finetune(settings)
    finetune(config(opinions, tmp_path / "run", epochs=1, task=task))  # the same rows in another folder
    for split, name in (("train", "train"), ("dev", "held_out")):
        file = glue / "SST-2" / f"{split}.tsv"
        content = file.read_text(encoding="utf-8")
        lines = content.splitlines(keepends=True)
        for change in ([lines[0], *lines[:0:-1]], lines[:-1], [*lines, lines[-1]]):
            file.write_text("".join(change), encoding="utf-8")
            with pytest.raises(ConfigError, match=rf"data_fingerprint\.{name}: was '"):
                finetune(config(opinions, tmp_path / "run", epochs=1, task=task))
        file.write_text(content, encoding="utf-8")


def test_two_ranks_share_the_work_and_agree_with_one(opinions: dict[str, Path], tmp_path: Path) -> None:
    two = {"deepspeed": {"zero_stage": 2}, "steps": 6, "global_batch_rows": 4, "micro_batch_rows": 2}
    settings = config(opinions, tmp_path / "run")
    mapping = to_mapping(settings)
    mapping["training"] |= two
    (tmp_path / "config.yaml").write_text(dump_yaml(mapping), encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from spade_t5.config import from_mapping, read_yaml\n"
        "from spade_t5.finetune.config import FinetuneConfig\n"
        "from spade_t5.finetune.run import finetune\n"
        "finetune(from_mapping(FinetuneConfig, read_yaml(Path(sys.argv[1]))))\n",
        encoding="utf-8",
    )
    done = torchrun([str(script), str(tmp_path / "config.yaml")], num_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    records = read(tmp_path / "run" / "predictions" / "sst2-validation.jsonl")
    assert [record["row"] for record in records] == list(range(61))
    again = evaluate_config(tmp_path / "run", None, [])
    assert evaluate_model(tmp_path / "run", again.task.build(), config=again.evaluation, rows=again.rows) == scores


def test_a_foreign_label_stops_the_run_before_anything_is_written(opinions: dict[str, Path], tmp_path: Path) -> None:
    with (opinions["glue"] / "SST-2" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("the film \t7\n")
    with pytest.raises(DataError, match=r"train.tsv line 402: label '7' is outside the task sst2; allowed: '0', '1'"):
        finetune(config(opinions, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_wrong_settings_are_named(opinions: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: required with model.preset"):
        config(opinions, tmp_path, tokenizer=None)
    with pytest.raises(ConfigError, match=r"did you mean 'rows.row_tokens'"):
        config(opinions, tmp_path, rows={"row_token": 3})
    with pytest.raises(ConfigError, match=r"task.name: 'sst' is not one of .*sst2"):
        config(opinions, tmp_path, task={"name": "sst"})
    with pytest.raises(ConfigError, match="pydocs-summary generates text: use mode text-to-text"):
        finetune(config(opinions, tmp_path / "run", mode="encoder-head", task={"name": "pydocs-summary"}))
    with pytest.raises(ConfigError, match=r"--task: .* was not fine-tuned here"):
        evaluate_config(tmp_path, None, [])


def test_epochs_bound_the_steps() -> None:
    training = TrainingConfig(steps=100, global_batch_rows=8, micro_batch_rows=8)
    assert bounded_by_epochs(training, None, 50).steps == 100
    assert bounded_by_epochs(training, 2, 50).steps == 13  # 100 rows in batches of 8
    assert bounded_by_epochs(training, 0.01, 50).steps == 1
    assert bounded_by_epochs(training, 50, 50).steps == 100
    decaying = dataclasses.replace(training, schedule=WSDSchedule(warmup_steps=8, decay_steps=6))
    assert bounded_by_epochs(decaying, 3, 50).steps == 19
    with pytest.raises(
        ConfigError, match=r"epochs: 2 are 13 steps: training\.schedule\.decay_steps: 6 is a decay of"
    ) as caught:
        bounded_by_epochs(decaying, 2, 50)
    documented(str(caught.value))


@pytest.mark.parametrize("num_outputs", [None, 3, 1])
def test_packing_changes_neither_the_summed_loss_nor_the_gradients(num_outputs: int | None) -> None:
    torch.manual_seed(0)
    lengths = [(5, 2), (1, 3), (9, 1), (3, 4), (7, 2)]
    sources, targets = ([torch.randint(3, 40, (pair[side],)).tolist() for pair in lengths] for side in (0, 1))
    labels = [0.5, 2.5, 1.0, 4.0, 0.0] if num_outputs == 1 else [0, 2, 1, 1, 0]
    examples = EncodedExamples(sources, targets, labels, 0, 0)
    model_config = SpadeT5Config.from_preset("tiny", vocab_size=128, **TINY, num_labels=num_outputs or 2)
    cls = SpadeT5ForConditionalGeneration if num_outputs is None else SpadeT5ForSequenceClassification
    model = cls(model_config).double().eval()
    objective = Seq2SeqObjective() if num_outputs is None else ClassificationObjective(num_outputs)
    outcomes = []
    for rows in ([(0, 1, 2), (), (3, 4)], [(i,) for i in range(5)]):
        source = ExampleRows(examples, rows, pad_token_id=0, num_outputs=num_outputs)
        batch = source.collate([*range(len(rows)), -1])
        if num_outputs == 1:
            batch["labels"] = batch["labels"].double()
        model.zero_grad()
        loss = objective.loss_sums(model, batch).whole
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outcomes.append((objective.num_targets(batch), loss.item(), gradients))
    assert outcomes[0][0] == outcomes[1][0]
    # losses are summed in float32 by the objectives: seven digits
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], rel=1e-6)
    assert torch.allclose(outcomes[0][2], outcomes[1][2], rtol=0, atol=1e-6 * float(outcomes[1][2].abs().max()))

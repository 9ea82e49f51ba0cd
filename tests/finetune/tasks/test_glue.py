import gzip
from pathlib import Path

import pytest

from spade_t5.errors import DataError
from spade_t5.finetune.sources import FolderSource, HubSource
from spade_t5.finetune.tasks.glue import GlueTask, Mrpc, Rte, Sst2, StsB, similarity_text, text_to_value
from spade_t5.testing import dev_data

STSB_HEADER = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return folder


def test_sst2_has_t5s_text_form(tmp_path: Path) -> None:
    write(tmp_path, "SST-2/train.tsv.gz", "sentence\tlabel", "a warm film \t1", 'dull " as ever \t0')
    task = Sst2(source=FolderSource(path=tmp_path)).build()
    first, second = task.examples("train")
    assert (first.source, first.target, first.reference) == ("sst2 sentence: a warm film", "positive", 1)
    assert (second.source, second.target, second.reference) == ('sst2 sentence: dull " as ever', "negative", 0)
    assert (task.postprocess("negative"), task.postprocess("positive"), task.postprocess("good")) == (0, 1, -1)


def test_mrpc_drops_the_byte_order_mark_and_keeps_quotes(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    lines = [header, '1\t7\t8\t" We won , he said .\tHe said : we won . "', "0\t7\t9\tIt rained .\tIt snowed ."]
    write(tmp_path, "MRPC/dev.tsv", *lines)
    task = Mrpc(source=FolderSource(path=tmp_path)).build()
    first, second = task.examples("validation")
    assert first.source == 'mrpc sentence1: " We won , he said . sentence2: He said : we won . "'
    assert (first.target, first.reference) == ("equivalent", 1)
    assert (second.target, second.reference) == ("not_equivalent", 0)
    assert task.metrics == ("f1", "accuracy")


def test_rte_labels_are_words(tmp_path: Path) -> None:
    lines = [
        "index\tsentence1\tsentence2\tlabel",
        "0\tA cat sleeps.\tAn animal sleeps.\tentailment",
        "1\tA.\tB.\tnot_entailment",
    ]
    write(tmp_path, "RTE/train.tsv", *lines)
    first, second = Rte(source=FolderSource(path=tmp_path)).build().examples("train")
    assert first.source == "rte sentence1: A cat sleeps. sentence2: An animal sleeps."
    assert (first.target, first.reference) == ("entailment", 0)
    assert (second.target, second.reference) == ("not_entailment", 1)


def test_stsb_rounds_targets_but_not_references(tmp_path: Path) -> None:
    write(
        tmp_path, "STS-B/dev.tsv", STSB_HEADER, "0\tg\tf\t2012\t1\tnone\tnone\tA bird flies.\tA bird is flying.\t3.667"
    )
    task = StsB(source=FolderSource(path=tmp_path)).build()
    (only,) = task.examples("validation")
    assert only.source == "stsb sentence1: A bird flies. sentence2: A bird is flying."
    assert (only.target, only.reference) == ("3.6", 3.667)
    assert only.target in task.label_words
    assert task.num_outputs == 1


@pytest.mark.parametrize(
    ("score", "text"), [(0, "0.0"), (5, "5.0"), (2.5, "2.4"), (1.7, "1.6"), (3.1, "3.2"), (4.75, "4.8")]
)
def test_similarity_rounds_to_a_fifth_halves_to_even(score: float, text: str) -> None:
    assert similarity_text(score) == text


def test_generated_numbers_are_read_as_t5_does() -> None:
    assert [text_to_value(text) for text in ("3.8", " 4 ", "nan", "inf", "high", "")] == [
        3.8,
        4.0,
        -1.0,
        -1.0,
        -1.0,
        -1.0,
    ]


@pytest.mark.parametrize("label", ["2", "positive", "-1", ""])
def test_label_outside_sst2_is_refused(tmp_path: Path, label: str) -> None:
    write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", "fine .\t1", f"odd .\t{label}")
    task = Sst2(source=FolderSource(path=tmp_path)).build()
    with pytest.raises(
        DataError, match=rf"dev.tsv line 3: label '{label}' is outside the task sst2; allowed: '0', '1'"
    ):
        task.examples("validation")


@pytest.mark.parametrize("score", ["5.1", "-0.2", "nan", "high"])
def test_score_outside_stsb_is_refused(tmp_path: Path, score: str) -> None:
    write(tmp_path, "STS-B/dev.tsv", STSB_HEADER, f"0\tg\tf\t2012\t1\tnone\tnone\tA.\tB.\t{score}")
    with pytest.raises(DataError, match="outside the task stsb; allowed: 0 to 5"):
        StsB(source=FolderSource(path=tmp_path)).build().examples("validation")


def test_a_table_without_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "RTE/dev.tsv", "index\tsentence1\tsentence2", "0\tA.\tB.")
    with pytest.raises(DataError, match=r"dev.tsv line 2: no field 'label'"):
        Rte(source=FolderSource(path=tmp_path)).build().examples("validation")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SST-2/train.tsv: not found, neither plain nor \.gz"):
        Sst2(source=FolderSource(path=tmp_path)).build().examples("train")


def test_hub_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a folder in the hub's layout, read by the same call that reads the hub: class indices instead of the table's labels
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    card = "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: train\n    path: rte/train.jsonl\n---\n"
    rows = [
        '{"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0}',
        '{"sentence1": "C.", "sentence2": "D.", "label": 0, "idx": 1}',
    ]
    write(tmp_path / "glue", "README.md", card)
    write(tmp_path / "glue", "rte/train.jsonl", *rows)
    task = Rte(source=HubSource(dataset=str(tmp_path / "glue"))).build()
    assert [(e.source, e.target, e.reference) for e in task.examples("train")] == [
        ("rte sentence1: A. sentence2: B.", "not_entailment", 1),
        ("rte sentence1: C. sentence2: D.", "entailment", 0),
    ]
    with pytest.raises(DataError, match="rte validation: cannot be loaded"):
        task.examples("validation")


@pytest.mark.dev_data
@pytest.mark.parametrize(
    ("task", "split", "num_rows", "count_of_one"),
    [(Sst2, "train", 60_614, 33_828), (Sst2, "validation", 872, 444), (Mrpc, "train", 3_499, 2_305), (Mrpc, "validation", 408, 279),
     (Rte, "train", 2_241, 1_103), (Rte, "validation", 277, 131)],
)  # fmt: skip
def test_no_row_of_the_original_tables_is_lost(
    task: type[GlueTask], split: str, num_rows: int, count_of_one: int
) -> None:
    examples = task(source=FolderSource(path=dev_data() / "glue")).build().examples(split)
    assert len(examples) == num_rows
    assert sum(example.reference == 1 for example in examples) == count_of_one


@pytest.mark.dev_data
@pytest.mark.parametrize(("split", "num_rows", "mean"), [("train", 5_749, 2.7010), ("validation", 1_500, 2.3639)])
def test_no_row_of_stsb_is_lost(split: str, num_rows: int, mean: float) -> None:
    examples = StsB(source=FolderSource(path=dev_data() / "glue")).build().examples(split)
    assert len(examples) == num_rows
    assert sum(float(example.reference) for example in examples) / num_rows == pytest.approx(mean, abs=5e-5)


@pytest.mark.dev_data
@pytest.mark.parametrize("task", [Sst2, Mrpc, StsB, Rte])
def test_the_original_one_row_tables_are_read(task: type[GlueTask]) -> None:
    built = task(source=FolderSource(path=dev_data() / "glue_tiny_fixture")).build()
    assert len(built.examples("train")) == len(built.examples("validation")) == 1

import json
from pathlib import Path

import pytest

from spade_t5.errors import DataError
from spade_t5.finetune.sources import FilesSource
from spade_t5.finetune.tasks.user import TextClassification


def source(tmp_path: Path, *rows: object) -> FilesSource:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FilesSource(train=path, validation=path)


def test_labels_become_words(tmp_path: Path) -> None:
    rows = source(tmp_path, {"text": "buy now", "label": 1}, {"text": "see you", "label": "0"})
    task = TextClassification(source=rows, labels=("0", "1"), label_words=("ham", "spam")).build()
    first, second = task.examples("train")
    assert (first.source, first.target, first.reference) == ("classify text: buy now", "spam", 1)
    assert (second.target, second.reference) == ("ham", 0)
    assert task.postprocess(" ham ") == 0
    assert task.num_outputs == 2


def test_several_text_columns(tmp_path: Path) -> None:
    rows = source(tmp_path, {"title": "T", "body": "B", "kind": "news"})
    task = TextClassification(
        source=rows, labels=("news", "blog"), text_fields=("title", "body"), label_field="kind", prompt="kind of page"
    ).build()
    (only,) = task.examples("train")
    assert (only.source, only.target) == ("kind of page title: T body: B", "news")


@pytest.mark.parametrize("label", [2, "spam", None, True, 1.0])
def test_label_outside_the_task_is_refused(tmp_path: Path, label: object) -> None:
    rows = source(tmp_path, {"text": "a", "label": 0}, {"text": "b", "label": label})
    with pytest.raises(
        DataError, match=r"a.jsonl line 2: label .* is outside the task text-classification; allowed: '0', '1'"
    ):
        TextClassification(source=rows, labels=("0", "1")).build().examples("train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ("a",)}, "at least two"),
        ({"labels": ("a", "a")}, "all different"),
        ({"labels": ("a", "b"), "label_words": ("x",)}, "as many as labels"),
        ({"labels": ("a", "b"), "label_words": ("x", "x")}, "all different"),
        ({"labels": ("a", "b"), "text_fields": ()}, "at least one column"),
    ],
)
def test_inconsistent_configs_are_refused(tmp_path: Path, values: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassification(source=source(tmp_path, {"text": "a", "label": "a"}), **values)

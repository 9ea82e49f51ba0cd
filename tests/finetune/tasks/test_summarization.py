import json
from pathlib import Path
from typing import Any

import pytest

from spade_t5.errors import DataError
from spade_t5.finetune.metrics import baseline
from spade_t5.finetune.sources import FilesSource
from spade_t5.finetune.tasks.summarization import CnnDailymail, SciSumm, Summarization
from spade_t5.testing import dev_data


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_cnn_dailymail_keeps_a_highlight_on_each_line(tmp_path: Path) -> None:
    row = {"id": "1", "article": "(CNN)It rained. Then it stopped.", "highlights": "Rain came .\nRain went ."}
    path = jsonl(tmp_path / "a.jsonl", row)
    task = CnnDailymail(source=FilesSource(train=path, validation=path)).build()
    (only,) = task.examples("validation")
    assert only.source == "summarize: (CNN)It rained. Then it stopped."
    assert only.target == only.reference == "Rain came .\nRain went ."
    assert task.postprocess(" Rain came . Rain went .") == only.reference


def test_scisumm_never_shows_the_other_summary(tmp_path: Path) -> None:
    row = {
        "id": "A",
        "title": "T",
        "abstract": "We parse.",
        "document": "1 Introduction\nParsing is hard.",
        "summary": "They parse.",
    }
    source = FilesSource(train=jsonl(tmp_path / "a.jsonl", row), validation=tmp_path / "a.jsonl")
    for target, text in (("abstract", "We parse."), ("summary", "They parse.")):
        (only,) = SciSumm(source=source, target=target).build().examples("train")
        assert only.target == text
        assert only.source == "summarize: 1 Introduction\nParsing is hard."


def test_columns_of_user_files_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"body": "Long. Text.", "tldr": "Short."}, {"body": "Only body."})
    source = FilesSource(train=path, validation=path)
    task = Summarization(source=source, document_field="body", summary_field="tldr", lead_sentences=1).build()
    assert task.examples("train", limit=1)[0].source == "summarize: Long. Text."
    with pytest.raises(DataError, match="line 2: no field 'tldr'; the row has: body"):
        task.examples("train")


@pytest.mark.dev_data
def test_lead_3_of_cnn_dailymail_is_in_its_usual_range() -> None:
    path = dev_data() / "summ" / "cnn_dailymail_validation.jsonl.gz"
    task = CnnDailymail(source=FilesSource(train=path, validation=path)).build()
    result = baseline(task, [], task.examples("validation", limit=200))
    assert result is not None
    assert 25 < result.scores.values["rouge1"] < 45
    assert result.scores.values["rougeLsum"] > result.scores.values["rougeL"] > result.scores.values["rouge2"] > 5


@pytest.mark.dev_data
def test_scisumm_rows_are_divided_without_overlap() -> None:
    task = SciSumm(source=FilesSource(train=dev_data() / "summ" / "scisumm.jsonl.gz")).build()
    train, held = ({example.source for example in task.examples(split)} for split in ("train", "validation"))
    assert len(train) + len(held) == 723
    assert not train & held
    assert 40 <= len(held) <= 110

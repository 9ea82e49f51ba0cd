import gzip
import json
from pathlib import Path

import pytest

from spade_t5.data.files import BadRows
from spade_t5.data.pydocs import split_of
from spade_t5.errors import DataError
from spade_t5.pretrain.corpora import START, Corpus, FilesCorpus, HubCorpus, PydocsCorpus


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.read(START, BadRows(strict=True))]


def write_rows(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def check_resumes_anywhere(corpus: Corpus, num_bad_rows: int) -> None:
    bad_rows = BadRows()
    documents = list(corpus.read(START, bad_rows))
    assert bad_rows.count == num_bad_rows
    assert len({document.position for document in documents}) == len(documents)
    for number, document in enumerate(documents):
        rest_bad_rows = BadRows()
        rest = list(corpus.read(document.position, rest_bad_rows))
        assert rest == documents[number + 1 :]
        assert sum(d.bad_rows for d in documents[: number + 1]) + rest_bad_rows.count == num_bad_rows


def test_files_are_read_in_order_and_from_any_position(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"body": "a1"}, "bad\n", {"body": "a2"}, {"other": 1}, "bad\n"])
    write_rows(tmp_path / "c.jsonl", ["bad\n", {"body": "c1"}, {"body": "c2"}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "b1"}\n'))
    corpus = FilesCorpus(paths=(str(tmp_path),), text_field="body").open()
    assert corpus.num_files == 3
    assert [d.text for d in corpus.read(START, BadRows())] == ["a1", "a2", "b1", "c1", "c2"]
    check_resumes_anywhere(corpus, num_bad_rows=4)


def test_fingerprint_tells_other_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "a1"}])
    config = FilesCorpus(paths=(str(tmp_path),))
    before = config.open().fingerprint
    assert config.open().fingerprint == before
    write_rows(tmp_path / "b.jsonl", [{"text": "b1"}])
    assert config.open().fingerprint != before


def test_hub_layout_of_a_local_folder_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_rows(tmp_path / "set/data/train-00000.jsonl", [{"text": f"t{i}", "url": "u"} for i in range(5)])
    write_rows(tmp_path / "set/data/train-00001.jsonl", [{"text": None, "url": "u"}, {"text": "t5", "url": "u"}])
    write_rows(tmp_path / "set/data/validation-00000.jsonl", [{"text": "v0", "url": "u"}])
    corpus = HubCorpus(dataset=str(tmp_path / "set")).open()
    assert [d.text for d in corpus.read(START, BadRows())] == [f"t{i}" for i in range(6)]
    check_resumes_anywhere(corpus, num_bad_rows=1)
    assert texts(HubCorpus(dataset=str(tmp_path / "set"), split="validation").open()) == ["v0"]
    for wrong in ({"dataset": str(tmp_path / "none")}, {"dataset": str(tmp_path / "set"), "split": "dev"}):
        with pytest.raises(DataError, match=r"corpus\.dataset: .* cannot be loaded"):
            HubCorpus(**wrong).open()


def test_pydocs_keep_packages_together(tmp_path: Path) -> None:
    corpus = PydocsCorpus(packages=("json", "logging", "asyncio"), cache_dir=tmp_path).open()
    documents = list(corpus.read(START, BadRows()))
    assert {document.split for document in documents} == {split_of("json"), split_of("logging"), split_of("asyncio")}
    assert list(corpus.read(documents[9].position, BadRows())) == documents[10:]

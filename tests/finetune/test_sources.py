import gzip
import logging
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError, DataError
from spade_t5.finetune.sources import FilesSource, content_share, file_rows
from spade_t5.finetune.task import Row


def write(path: Path, *lines: str) -> Path:
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_quotes_are_text(tmp_path: Path) -> None:
    # csv's default quoting would join rows 1 to 3 into one
    path = write(tmp_path / "a.tsv", "text\tlabel", '"open\t1', "plain\t0", 'close"\t1', "''\t0")
    assert [row.fields["text"] for row in file_rows(path)] == ['"open', "plain", 'close"', "''"]


def test_byte_order_mark_carriage_returns_and_empty_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv.gz", "\ufefftext\tlabel\r", "a \t1\r", "", "b\t0")
    rows = list(file_rows(path))
    assert [dict(row.fields) for row in rows] == [{"text": "a ", "label": "1"}, {"text": "b", "label": "0"}]
    assert rows[1].origin == f"{path} line 4"


def test_line_separators_inside_a_field_do_not_split_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel", "one\u2028two\x0cthree\x85four\t1")
    assert [row.fields["text"] for row in file_rows(path)] == ["one\u2028two\x0cthree\x85four"]


def test_a_short_line_is_reported_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel", "a\t1", "alone", "b\t0\textra", "c\t0")
    with caplog.at_level(logging.WARNING):
        assert [row.fields["text"] for row in file_rows(path)] == ["a", "c"]
    assert f"{path}: line 3: 1 fields" in caplog.text
    assert f"{path}: line 4: 3 fields" in caplog.text
    with pytest.raises(DataError, match="line 3: 1 fields"):
        list(file_rows(path, strict=True))


def test_jsonl_rows_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", '{"text": "a"}', "{broken", '{"text": "b"}')
    assert [(row.fields["text"], row.origin) for row in file_rows(path)] == [
        ("a", f"{path} line 1"),
        ("b", f"{path} line 3"),
    ]
    with pytest.raises(DataError, match="line 2"):
        list(file_rows(path, strict=True))


@pytest.mark.parametrize("name", ["a.csv", "absent.tsv", "absent.jsonl"])
def test_unusable_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.csv", "text,label")
    with pytest.raises(DataError, match=name):
        list(file_rows(tmp_path / name))


def test_held_out_rows_follow_their_content(tmp_path: Path) -> None:
    lines = [f"text {i}\t1" for i in range(400)]
    one = FilesSource(train=write(tmp_path / "a.tsv", "text\tlabel", *lines), held_out=0.25)
    other = FilesSource(train=write(tmp_path / "b.tsv", "text\tlabel", *reversed(lines), "new\t0"), held_out=0.25)
    train, held = ({row.fields["text"] for row in one.rows(split)} for split in ("train", "validation"))
    assert not train & held
    assert len(train | held) == 400
    assert 70 <= len(held) <= 130
    assert {row.fields["text"] for row in other.rows("validation")} - {"new"} == held


def test_given_files_are_not_divided(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "a.tsv", "text", "a", "b"), write(tmp_path / "b.tsv", "text", "c")
    source = FilesSource(train=train, validation=validation)
    assert [row.fields["text"] for row in source.rows("train")] == ["a", "b"]
    assert [row.fields["text"] for row in source.rows("validation")] == ["c"]
    with pytest.raises(ConfigError, match=r"task.source.test: no file given"):
        source.rows("test")
    with pytest.raises(ValueError, match=r"held_out: 1.0 must lie between 0 and 1"):
        FilesSource(train=train, held_out=1.0)


def test_content_share_ignores_origin_and_order_of_fields() -> None:
    share = content_share(Row({"a": 1, "b": "é"}, "here"))
    assert share == content_share(Row({"b": "é", "a": 1}, "there"))
    assert share != content_share(Row({"a": 1, "b": "e"}, "here"))
    assert 0 <= share < 1

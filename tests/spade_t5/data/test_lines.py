import contextlib
import gzip
import hashlib
import io
import itertools
import logging
import random
import sys
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest

from spade_t5.data import lines
from spade_t5.data.files import BadRows, read_rows
from spade_t5.data.lines import BrokenFileError, RawLine, raw_lines
from spade_t5.errors import DataError


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"\n\nab\r\nc", b"a\nbb\n\nccc"])
@pytest.mark.parametrize("block", [1, 2, 100])
def test_lines_and_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block: int) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    expected = io.BytesIO(content).readlines()
    for name in ("a.jsonl", "a.jsonl.gz"):
        found = list(raw_lines(tmp_path / name))
        assert [line.data for line in found] == [line.removesuffix(b"\n") for line in expected]
        assert [line.number for line in found] == list(range(1, len(expected) + 1))
        assert [line.byte_offset for line in found] == [0, *itertools.accumulate(map(len, expected))][: len(expected)]
        for start in range(len(expected) + 2):
            assert list(raw_lines(tmp_path / name, start_line=start)) == found[start:]


@pytest.mark.parametrize("block", [3, 64, 10_000])
def test_a_long_line_leaves_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    rows = [b"short", b"x" * 101, b"y" * 100, b"", b"z" * 5000]
    (tmp_path / "a.txt").write_bytes(b"\n".join(rows))
    found = list(raw_lines(tmp_path / "a.txt", max_line_bytes=100))
    assert [line.data for line in found] == [b"short", None, b"y" * 100, b"", None]
    assert [line.sha256 for line in found if line.data is None] == [
        hashlib.sha256(row).hexdigest() for row in rows if len(row) > 100
    ]
    assert [line.byte_offset for line in found] == [0, 6, 108, 209, 210]


def lines_before_the_break(path: Path) -> tuple[list[RawLine], str]:
    found: list[RawLine] = []
    with pytest.raises(BrokenFileError) as broken:
        found.extend(raw_lines(path))  # extend keeps what came before the error
    return found, str(broken.value)


@pytest.mark.parametrize("block", [1000, 2**16])
def test_everything_before_an_error_is_given_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    generator = random.Random(0)
    content = b"".join(b"%d %d\n" % (n, generator.randrange(10**9)) for n in range(20_000))
    damaged = bytearray(gzip.compress(content))
    damaged[len(damaged) // 2 :] = generator.randbytes(50_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damaged)
    bytewise = zlib.decompressobj(31)
    readable = b""
    with contextlib.suppress(zlib.error):
        for place in range(len(damaged)):
            readable += bytewise.decompress(damaged[place : place + 1])
    assert not bytewise.eof
    monkeypatch.setattr(lines, "_PACKED_BLOCK_BYTES", block)
    found, reason = lines_before_the_break(path)
    assert reason == "gzip is damaged"
    assert [line.data for line in found] == readable.split(b"\n")[:-1]
    assert len(found) > 5000


class FlakyFile(io.BytesIO):
    """Fails at the first read that comes to a place of the failures, or at each if they last."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(state["content"])
        self.state = state

    def read(self, size: int | None = -1) -> bytes:
        passed = {place for place in self.state["failures"] if place <= self.tell()}
        if passed:
            if not self.state["lasting"]:
                self.state["failures"] -= passed
            raise self.state["error"]
        return super().read(size)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A file system whose files fail: content, places of failures that happen once each, and how often files were opened."""
    state: dict[str, Any] = {
        "content": b"",
        "failures": set(),
        "lasting": False,
        "error": OSError("reset"),
        "opened": 0,
    }

    class FlakyFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "flaky"
        cachable = False

        def _open(self, path: str, mode: str = "rb", **options: Any) -> FlakyFile:
            state["opened"] += 1
            return FlakyFile(state)

    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(lines, "RETRY_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(lines, "_PACKED_BLOCK_BYTES", 1000)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 1000)
    return state


class FileSystemError(Exception):
    """As some file systems raise, without a base in common with others."""


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("error", [OSError("reset"), FileSystemError("503")])
def test_a_remote_file_is_opened_again_behind_the_last_row(
    remote: dict[str, Any], caplog: pytest.LogCaptureFixture, name: str, error: Exception
) -> None:
    content = b"".join(b'{"text": "%d"}\n' % (n * 7919) for n in range(2000))
    remote["content"] = gzip.compress(content) if name.endswith(".gz") else content
    remote |= {"failures": {0, 3000, 6000, 6500}, "error": error}
    bad_rows = BadRows()
    with caplog.at_level(logging.WARNING):
        rows = list(read_rows(f"flaky://host/{name}", bad_rows=bad_rows, required={"text": str}))
    assert [row.line for row in rows] == list(range(1, 2001))
    assert rows[1999].fields["text"] == str(1999 * 7919)
    assert remote["opened"] == 5
    assert bad_rows.count == 0
    assert "opening it again" in caplog.text


def test_a_remote_parquet_file_is_opened_again(remote: dict[str, Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = io.BytesIO()
    texts = [str(n * 7919) for n in range(5000)]
    parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=500)
    remote |= {"content": sink.getvalue(), "failures": {0, 9000, 15_000}}
    bad_rows = BadRows()
    rows = list(read_rows("flaky://host/a.parquet", bad_rows=bad_rows, required={"text": str}))
    assert [row.fields["text"] for row in rows] == texts
    assert bad_rows.count == 0
    assert remote["opened"] == 4


def test_a_remote_file_that_stays_away_stops_the_run(remote: dict[str, Any]) -> None:
    remote |= {"content": b'{"text": "a"}\n' * 1000, "failures": {5000}, "lasting": True}
    rows = []
    reading = read_rows("flaky://host/a.jsonl", bad_rows=BadRows())
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read behind line 357, tried 4 times: OSError: reset"):
        rows.extend(reading)
    assert len(rows) == 357
    assert remote["opened"] == 4


def test_a_remote_file_that_is_really_broken_is_believed_in_the_end(remote: dict[str, Any]) -> None:
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % (n * 7919) for n in range(2000)))
    remote["content"] = content[: len(content) // 2]
    bad_rows = BadRows()
    rows = list(read_rows("flaky://host/a.jsonl.gz", bad_rows=bad_rows, required={"text": str}))
    assert 500 < len(rows) < 1500
    assert bad_rows.reasons == {"gzip ends too early": 1}
    assert remote["opened"] == 4


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(b"%d\n" % n for n in range(50_000))
    frames = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
    path = tmp_path / "a.txt.zst"
    path.write_bytes(frames)
    assert b"\n".join(line.data or b"" for line in raw_lines(path)) == content.removesuffix(b"\n")
    path.write_bytes(frames[:-20] + b"\0" * 20)
    assert lines_before_the_break(path)[1] == "zstd is damaged"
    path.write_bytes(frames + b"waste")
    found, reason = lines_before_the_break(path)
    assert (len(found), reason) == (50_000, "zstd is damaged")


@pytest.mark.parametrize("num_frames", [1, 2])
def test_zstandard_that_ends_too_early(tmp_path: Path, num_frames: int) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = b"".join(b"%d\n" % (n * 7919) for n in range(200_000))
    half = len(content) // num_frames
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    whole = b"".join(compressor.compress(content[start : start + half]) for start in range(0, len(content), half))
    path = tmp_path / "a.txt.zst"
    for num_bytes, fewest, most in (
        (len(whole) * 3 // 4, 50_000, 199_999),
        (len(whole) - 4, 199_000, 200_000),
        (5, 0, 0),
        (0, 0, 0),
    ):
        path.write_bytes(whole[:num_bytes])
        found, reason = lines_before_the_break(path)
        assert reason == "zstd ends too early"
        assert fewest <= len(found) <= most
        assert [line.data for line in found] == content.split(b"\n")[: len(found)]


@pytest.mark.parametrize("block", [100, 2**16])
def test_everything_before_an_error_of_zstandard_is_given_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Where an error follows at once on the blocks of a frame, a call that unpacks both gives neither."""
    zstandard = pytest.importorskip("zstandard")
    generator = random.Random(0)
    first, second = (b"".join(b"%d\n" % generator.randrange(10**9) for _ in range(count)) for count in (30_000, 50))
    compressor = zstandard.ZstdCompressor().compressobj()
    frame = compressor.compress(second) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(first) + frame + b"\xff" * 500)
    monkeypatch.setattr(lines, "_PACKED_BLOCK_BYTES", block)
    found, reason = lines_before_the_break(path)
    assert reason == "zstd is damaged"
    assert [line.data for line in found] == (first + second).split(b"\n")[:-1]


def test_zstandard_with_a_large_window(tmp_path: Path) -> None:
    """As `zstd --long=28` and above write it; decompressors refuse this unless they are told."""
    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor().compressobj()
    frame = bytearray(compressor.compress(b"a\nb\n") + compressor.flush())
    frame[5] = (28 - 10) << 3  # the window, instead of compressing as much
    assert zstandard.get_frame_parameters(bytes(frame)).window_size == 2**28
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert [line.data for line in raw_lines(tmp_path / "a.txt.zst")] == [b"a", b"b"]


def test_zstandard_that_is_not_installed_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"whatever")
    with pytest.raises(DataError, match="pip install zstandard"):
        list(raw_lines(tmp_path / "a.txt.zst"))


def test_a_file_that_may_not_be_read_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n")

    def refused(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied"):
        list(read_rows(path, bad_rows=BadRows()))

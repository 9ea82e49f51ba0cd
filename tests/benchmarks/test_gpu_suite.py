"""The sitting on a GPU: its parts, their time limits, and what is left of a part that is cut off."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from spade_t5.benchmarks import gpu_suite
from spade_t5.benchmarks.gpu_suite import Part

REPOSITORY = Path(__file__).resolve().parents[2]


def python(code: str, limit_seconds: float = 60.0) -> Part:
    return Part(name=f"part-{limit_seconds:g}", command=[sys.executable, "-c", code], limit_seconds=limit_seconds)


def test_fits_into_nine_minutes_with_the_kernels_first(tmp_path: Path) -> None:
    parts = gpu_suite.parts(tmp_path, REPOSITORY / "tests")
    assert [part.name for part in parts] == ["kernel-tests", "kernels", "other-tests"]
    assert sum(part.limit_seconds for part in parts) < 540
    assert any("local_attention" in word for word in parts[0].command)


def test_only_files_with_the_marker_are_imported(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "test_a.py").write_text("@pytest.mark.gpu\ndef test(): ...\n")
    (tmp_path / "test_b.py").write_text("import datasets\n")
    assert gpu_suite.files_with_gpu_tests(tmp_path) == [tmp_path / "kernels" / "test_a.py"]
    assert [part.name for part in gpu_suite.parts(tmp_path, tmp_path)] == ["kernel-tests", "kernels"]


def test_a_part_that_is_cut_off_keeps_its_output(tmp_path: Path) -> None:
    code = "import subprocess, sys; print('done so far', flush=True); subprocess.run(['sleep', '60'])"
    outcome = gpu_suite.run_part(python(code, 3.0), tmp_path / "log")
    assert outcome.exit_code is None
    assert outcome.seconds < 30
    assert (tmp_path / "log").read_text() == "done so far\n"


def test_runs_all_parts_and_fails_if_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [python("raise SystemExit(3)", 50.0), python("print('all well')", 51.0)]
    monkeypatch.setattr(gpu_suite, "parts", lambda out, tests: made)
    with pytest.raises(SystemExit) as exit_info:
        gpu_suite.run(argparse.Namespace(out=tmp_path / "out", tests=tmp_path / "none"))
    assert exit_info.value.code == 1
    found = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    assert [part["exit_code"] for part in found["parts"]] == [3, 0]
    assert "all well" in capsys.readouterr().out

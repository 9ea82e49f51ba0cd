"""`spade-t5 bench NAME` and `python -m spade_t5.benchmarks.NAME`: help, files, mistakes."""

import json
import sys
from pathlib import Path

import pytest

from spade_t5.launch.cli import main
from spade_t5.launch.commands.bench import BENCHMARKS
from spade_t5.testing import dev_data, run_command


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", name, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: spade-t5 bench {name}")


def test_step_beside_one_peer(tmp_path: Path) -> None:
    words = ["bench", "step", "--quick", "--preset", "tiny", "--compare", "hf-longt5", "--out", str(tmp_path)]
    assert main(words) == 0
    (comparison,) = json.loads((tmp_path / "step.json").read_text())["comparisons"]
    assert set(comparison["models"]) == {"spade-t5", "hf-longt5"}
    assert set(comparison["speedup_over"]) == {"hf-longt5"}


def test_checkpoints_beside_the_disk(tmp_path: Path) -> None:
    words = ["--preset", "tiny", "--batch-rows", "1", "--steps", "4", "--saves", "2", "--rounds", "1"]
    assert main(["bench", "checkpoints", *words, "--folder", str(tmp_path), "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "checkpoints.json").read_text())
    assert len(results["training"]["reports"]) == results["training"]["saves"] == 2
    assert all(0 < found["blocked_seconds"] < found["write_seconds"] for found in results["training"]["reports"])
    assert results["training"]["reports"][0]["num_bytes"] == results["alone"]["num_bytes"] > 4 * 4 * 4_900_000
    assert results["alone"]["gigabytes_per_second"].keys() >= {"save", "load", "bare write and fsync", "bare read"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints.json"]


@pytest.mark.dev_data
def test_data_on_real_text(tmp_path: Path) -> None:
    text, tokenizer = dev_data() / "text" / "c4_en.jsonl.gz", dev_data() / "tokenizer" / "t5_tokenizer_base.model"
    words = ["bench", "data", "--quick", "--text", str(text), "--tokenizer", str(tokenizer), "--out", str(tmp_path)]
    done = run_command([sys.executable, "-m", "spade_t5.launch", *words])
    assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert results.keys() == {"prepare", "loading", "span_corruption"}
    assert len(results["loading"]["ratio_to_training"]) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--compare", "hf-bert"], "--compare: hf-bert is unknown; use some of hf-t5,hf-longt5"),
        (["data", "--text", "a.jsonl.gz"], "--text: goes with --tokenizer; give both or neither"),
        (["data", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["checkpoints", "--steps", "3"], "--steps: 3 must be at least the number of saves, 4"),
        (["speed"], "argument NAME: invalid choice: 'speed'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_runs_as_a_module() -> None:
    done = run_command([sys.executable, "-m", "spade_t5.benchmarks.step", "--quick", "--compare", "hf-bert"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("use some of hf-t5,hf-longt5")

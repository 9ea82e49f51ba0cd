"""Bad input: one line that names field, value and remedy, exit code 2, and nothing written that was not there before."""

import gzip
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from spade_t5.checkpoint import list_checkpoints, write_manifest
from spade_t5.checkpoint.manifest import file_entry, read_manifest
from spade_t5.launch.cli import main
from spade_t5.pretrain.store import TokenStore
from spade_t5.testing import run_command
from spade_t5.training.run_folder import Resume, open_run_folder

TEXT = "The corpus of a test needs a few words in a row, and some more to make up a document of its own.\n"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; log.txt apart, which may tell of the attempt."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "log.txt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[Sequence[str]], str]:
    """Runs a command that must be refused without a trace in `tmp_path`; returns its one line."""

    def run_refused(words: Sequence[str]) -> str:
        before = contents(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}
        capsys.readouterr()
        assert main(words) == 2
        assert (contents(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}) == before
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(f"spade-t5 {words[0]}: ")
        return lines[0]

    return run_refused


Refused = Callable[[Sequence[str]], str]
PretrainWords = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training.step=3", "training.step: unknown config key; did you mean 'training.steps'?"),
        ("trainig.steps=3", "trainig: unknown config key; did you mean 'training'?"),
        ("model.d_modell=8", "d_modell: unknown model field; did you mean 'd_model'?"),
        ("model.preset=tny", "preset: 'tny' is not one of"),
        ("training.optimizer={name: adamv, learning_rate: 1}", "training.optimizer.name: 'adamv' is not one of"),
        ("training.schedule.warmup=3", "training.schedule.warmup: unknown config key; did you mean"),
        ("training.steps=many", "training.steps: 'many' is a str, expected int"),
        ("training.steps=2.5", "training.steps: 2.5 is a float, expected int"),
        ("training.steps=true", "training.steps: True is a bool, expected int"),
        ("training.steps=0", "training.steps: 0 must be at least 1"),
        ("training.precision=fp16", "training.precision: 'fp16' is not one of"),
        ("training=3", "training: 3 is not a mapping of keys to values"),
        ("model.d_model=wide", "d_model: 'wide' is a str, expected int"),
        ("objective.noise_density=1.5", "objective.noise_density: 1.5 must lie between 0 and 1"),
        ("objective.inputs_length=8192", "455 sentinels for 9101 raw tokens, the tokenizer has 40"),
        ("data.store=nowhere", "nowhere: not a token store"),
        (
            "model.vocab_size=512",
            "model.vocab_size: 512 is too small for the tokenizer, whose largest id is 639; use 640",
        ),
        ("steps", "argument 'steps': expected key=value"),
        ("training.steps=[1", "argument 'training.steps=[1': '[1' is not a YAML value"),
        ("training.deepspeed={zero_stage: 4}", "training.deepspeed.zero_stage: 4 is not one of 0, 1, 2, 3"),
        ("training.deepspeed={zero_stage: 2} training.optimizer={name: adafactor}", "adafactor needs whole parameters"),
    ],
)
def test_pretrain_config(
    word: str, message: str, refused: Refused, tmp_path: Path, pretrain_words: PretrainWords
) -> None:
    words = re.findall(r"\S+\{.*?\}|\S+=\[1|\S+", word)
    assert message in refused(pretrain_words(tmp_path / "run", *words))


def test_config_files(refused: Refused, tmp_path: Path) -> None:
    assert "missing.yaml: No such file" in refused(["pretrain", str(tmp_path / "missing.yaml")])
    assert "no shipped recipe has this name; recipes: " in refused(["pretrain", "demmo"])
    assert "did you mean" not in refused(["finetune", "demmo"])
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "broken.yaml: not valid YAML" in refused(["pretrain", str(tmp_path / "broken.yaml")])
    (tmp_path / "list.yaml").write_text("- 1")
    assert "list.yaml: holds a list, expected a mapping" in refused(["tokenizer", str(tmp_path / "list.yaml")])
    assert "corpus: required and not given" in refused(["prepare", f"out={tmp_path / 'out'}"])
    (tmp_path / "text.txt").write_text("no model here")
    assert "No such file" in refused(["tokenizer", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize("command", ["tokenizer", "prepare"])
def test_corpora(command: str, refused: Refused, tmp_path: Path, tokenizer: Path) -> None:
    words = [command, "corpus.name=files", f"out={tmp_path / 'out'}"]
    if command == "prepare":
        words.append(f"tokenizer={tokenizer}")
    missing = tmp_path / "missing.jsonl"
    assert f"{missing}: no such file" in refused([*words, f"corpus.paths=[{missing}]"])
    assert "corpus.path: unknown config key; did you mean 'corpus.paths'?" in refused(
        [*words, f"corpus.path={missing}"]
    )
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    for name in ("empty", "blank"):
        assert "corpus: " in refused([*words, f"corpus.paths=[{tmp_path / f'{name}.jsonl'}]"])
    (tmp_path / "text.doc").write_text(TEXT)
    assert "text.doc: unknown kind of file" in refused([*words, f"corpus.paths=[{tmp_path / 'text.doc'}]"])
    assert "not_a_package" in refused([*words, "corpus.name=pydocs", "corpus.packages=[not_a_package]"])


def test_tokenizer_settings(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["tokenizer", "corpus.name=files", f"corpus.paths=[{tmp_path / 'text.txt'}]", f"out={tmp_path / 'out'}"]
    assert "vocab_size: SentencePiece cannot learn 5000 pieces" in refused([*words, "vocab_size=5000"])
    assert "vocab_size: 20 must be at least 260" in refused([*words, "vocab_size=20"])
    (tmp_path / "out").mkdir()
    assert "exists already" in refused([*words, "vocab_size=300"])


def test_prepare_with_a_wrong_tokenizer(refused: Refused, tmp_path: Path) -> None:
    words = ["prepare", "corpus.name=pydocs", "corpus.packages=[json]", f"out={tmp_path / 'out'}"]
    assert "holds no tokenizer.json" in refused([*words, f"tokenizer={tmp_path}"])
    (tmp_path / "bad.model").write_bytes(b"not a model")
    assert "not a SentencePiece model" in refused([*words, f"tokenizer={tmp_path / 'bad.model'}"])


def test_a_store_of_another_tokenizer(
    refused: Refused, tmp_path: Path, store: Path, run: Path, pretrain_words: PretrainWords
) -> None:
    other = tmp_path / "tokenizer"
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
    assert main(["tokenizer", *corpus, "vocab_size=500", "num_sentinels=40", f"out={other}"]) == 0
    assert main(["prepare", *corpus, f"tokenizer={other}", f"out={tmp_path / 'other'}"]) == 0
    shutil.copytree(store, tmp_path / "store")
    assert "tokenizer_hash" in refused(["prepare", *corpus, f"tokenizer={other}", f"out={tmp_path / 'store'}"])
    # a run goes on with a store whose ids mean other pieces
    shutil.copytree(run, tmp_path / "run")
    line = refused(pretrain_words(tmp_path / "run", f"data.store={tmp_path / 'other'}", "training.steps=8"))
    assert "tokenizer_hash: was '" in line
    # a store into which another tokenizer was put
    shutil.copytree(other, tmp_path / "store" / "tokenizer", dirs_exist_ok=True)
    assert "made with tokenizer" in refused(pretrain_words(tmp_path / "new", f"data.store={tmp_path / 'store'}"))
    # evaluation of a run whose store was replaced
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["config"]["tokenizer_hash"] == TokenStore.open(store).tokenizer.hash


def test_a_label_outside_the_task(refused: Refused, tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"text": f"row {i}", "label": "yes" if i % 2 else "no"} for i in range(40)]
    rows[7]["label"] = "maybe"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run_dir": str(tmp_path / "run"),
        "task": {
            "name": "text-classification",
            "labels": ["no", "yes"],
            "source": {
                "name": "files",
                "train": str(tmp_path / "rows.jsonl"),
                "validation": str(tmp_path / "rows.jsonl"),
            },
        },
        "model": {"preset": "tiny"},
        "tokenizer": str(tokenizer),
        "training": {"steps": 1, "global_batch_rows": 4, "micro_batch_rows": 4},
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(config))
    line = refused(["finetune", str(tmp_path / "task.yaml")])
    assert "rows.jsonl line 8: label 'maybe' is outside the task text-classification; allowed: 'no', 'yes'" in line
    assert "did you mean 'task.labels'?" in refused(["finetune", str(tmp_path / "task.yaml"), "task.label=3"])


def test_export_evaluate_generate_verify(
    refused: Refused, tmp_path: Path, run: Path, store: Path, exported: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    assert f"--out: {out} already exists" in refused(["export", str(run), "--out", str(out)])
    assert "not a run folder" in refused(["export", str(tmp_path), "--out", str(tmp_path / "new")])
    assert "a checkpoint of step 4" in refused(["export", str(run), "--step", "4", "--out", str(tmp_path / "new")])
    assert "--max-shard-size: 'big'" in refused(
        ["export", str(run), "--max-shard-size", "big", "--out", str(tmp_path / "new")]
    )
    assert "name the task" in refused(["evaluate", str(tmp_path / "nowhere" / "run")])
    assert "name the task" in refused(["evaluate", str(exported)])
    assert "settings need --task" in refused(["evaluate", str(run), "evaluation.split=test"])
    assert "belongs to the held-out loss" in refused(["evaluate", str(exported), "--task", "rte", "--max-rows", "3"])
    folder = ["--task", "rte", "task.source={name: folder, path: nowhere}"]
    assert "rowss: unknown config key; did you mean 'rows'?" in refused(
        ["evaluate", str(run), *folder, "rowss.packing=true"]
    )
    assert "not found, neither plain nor .gz" in refused(
        ["evaluate", str(run), *folder, "--out", str(tmp_path / "new")]
    )
    missing = str(tmp_path / "nowhere" / "model")
    (tmp_path / "in.txt").write_text("a line\n")
    assert f"{missing}: no such folder" in refused(["generate", missing, "--input", str(tmp_path / "in.txt")])
    assert "give an existing text file" in refused(["generate", str(run), "--input", str(tmp_path / "none.txt")])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "is not UTF-8 text" in refused(["generate", str(run), "--input", str(tmp_path / "latin.txt")])
    assert "manifest.json: missing or unreadable" in refused(["verify", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--num-beams", "-1"], ["--max-new-tokens", "x"]])
def test_counts_on_the_command_line(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", str(run), *words])
    assert exit_info.value.code == 2
    assert f"argument {words[0]}: " in capsys.readouterr().err


def test_resume(refused: Refused, tmp_path: Path, run: Path, pretrain_words: PretrainWords) -> None:
    shutil.copytree(run, tmp_path / "run")
    words = pretrain_words(tmp_path / "run", "training.steps=8")
    missing = tmp_path / "missing"
    assert f"--resume: {missing} is no checkpoint and holds none" in refused([*words, "--resume", str(missing)])
    assert "already holds checkpoints" in refused([*words, "--resume", "none"])
    for change, line in (
        ("model.d_ff=96", "model.d_ff: was 64 in the checkpoint, is 96 now"),
        ("training.seed=1", "training.seed: was 0 in the checkpoint, is 1 now"),
        ("objective.inputs_length=32", "objective.inputs_length: was 64 in the checkpoint, is 32 now"),
        (
            "training.optimizer={name: sgd, learning_rate: 1.0}",
            "training.optimizer.name: was 'adamw' in the checkpoint, is 'sgd' now",
        ),
    ):
        assert f"{line}; a resumed run cannot change it" in refused([*words, change])
    for change, line in (
        (
            "training.log_every_steps=3",
            "training.steps: was 6 in the checkpoint, is 8 now; set it back, or add --allow-change",
        ),
        ("training.global_batch_rows=8", "training.global_batch_rows: was 4 in the checkpoint, is 8 now"),
        ("training.clip_norm=2", "training.clip_norm: was 1.0 in the checkpoint, is 2.0 now"),
    ):
        assert line in refused([*words, change])
    words += ["training.clip_norm=2.0", "--allow-change", "training.clip_norm"]
    assert "add --allow-change training.steps to change what is learned" in refused(words)
    assert "--allow-change: model is never changed in a run" in refused([*words, "--allow-change", "model"])
    assert main([*words, "--allow-change", "training.steps", "--strict-env"]) == 0
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000008"


def test_other_libraries(refused: Refused, tmp_path: Path, run: Path, pretrain_words: PretrainWords) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "state.json").read_text())
    state["provenance"]["torch"] = "1.0"
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(checkpoint)
    manifest["files"]["state.json"] = file_entry(checkpoint / "state.json")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, manifest.pop("files"), **manifest)
    line = refused([*pretrain_words(tmp_path / "run"), "--strict-env"])
    assert "--strict-env: torch: 1.0 made the checkpoint, here is " in line
    assert main(pretrain_words(tmp_path / "run")) == 0


def test_a_run_folder_that_cannot_be_one(refused: Refused, tmp_path: Path, pretrain_words: PretrainWords) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("file", "is a file; choose another"), ("link", f"give run_dir={tmp_path / 'nowhere'}")):
        line = refused(pretrain_words(tmp_path / name))
        assert f"run_dir: {tmp_path / name} is a" in line
        assert message in line


def test_a_second_run_in_a_folder(refused: Refused, tmp_path: Path, pretrain_words: PretrainWords) -> None:
    (tmp_path / "run").mkdir()
    with open_run_folder(tmp_path / "run", Resume()):
        lease = json.loads((tmp_path / "run" / "lease.json").read_text())
        line = refused(pretrain_words(tmp_path / "run"))
    assert f"run_dir: {tmp_path / 'run'} is in use by {lease['host']}:{lease['pid']}; wait for that run" in line


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "frozen.safetensors", "state.json"])
def test_a_damaged_checkpoint(
    file: str, refused: Refused, tmp_path: Path, run: Path, pretrain_words: PretrainWords
) -> None:
    shutil.copytree(run, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000006" / file
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    words = pretrain_words(tmp_path / "run")
    assert str(damaged) in refused([*words, "--resume", str(damaged.parent)])
    assert str(damaged) in refused(["export", str(tmp_path / "run"), "--out", str(tmp_path / "new")])
    assert str(damaged) in refused(["evaluate", str(tmp_path / "run")])
    # an older checkpoint still serves, by itself
    assert main(words) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000003", "step-00000006", "step-00000006.abandoned"}


def test_several_processes_without_deepspeed(
    refused: Refused, tmp_path: Path, pretrain_words: PretrainWords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(pretrain_words(tmp_path / "run"))
    assert "training.deepspeed: null, but 2 processes were launched; set training.deepspeed.zero_stage=1" in line


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_that_is_not_json(
    suffix: str, refused: Refused, tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"rows{suffix}"
    lines = "".join(f"{{broken\n{json.dumps({'text': f'{TEXT} {i}'})}\n[1]\n" for i in range(3)).encode()
    path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    words = ["corpus.name=files", f"corpus.paths=[{path}]", f"tokenizer={tokenizer}"]
    line = refused(["prepare", *words, f"out={tmp_path / 'strict'}", "--strict"])
    assert f"{path}: line 1: not JSON" in line
    assert main(["prepare", *words, f"out={tmp_path / 'store'}"]) == 0
    for number in (1, 4, 7):
        assert f"{path}: line {number}: not JSON" in caplog.text
    assert "6 bad rows of the corpus were left out" in caplog.text
    manifest = TokenStore.open(tmp_path / "store").manifest
    assert manifest["num_bad_rows"] == 6
    assert not list(tmp_path.glob("*.partial"))


def test_stderr_of_the_real_command(tmp_path: Path, run: Path, tokenizer: Path, pretrain_words: PretrainWords) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n{{broken\n")
    corpus = ["corpus.name=files", f"corpus.paths=[{tmp_path / 'rows.jsonl'}]", f"tokenizer={tokenizer}"]
    prepare = ["prepare", *corpus, f"out={tmp_path / 'store'}"]
    shutil.copytree(run, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for words, expected in (
        ([*prepare, "--strict"], "line 2: not JSON"),
        (pretrain_words(tmp_path / "new", "training.step=3"), "did you mean 'training.steps'?"),
        ([*pretrain_words(tmp_path / "run"), "--resume", str(damaged.parent)], "rank-00000.safetensors"),
    ):
        done = run_command([sys.executable, "-m", "spade_t5.launch", *words])
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"spade-t5 {words[0]}: ")
        assert expected in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run"}
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2
    done = run_command([sys.executable, "-m", "spade_t5.launch", *prepare])
    assert done.returncode == 0
    assert f"{tmp_path / 'rows.jsonl'}: line 2: not JSON" in done.stderr
    assert "1 bad rows of the corpus were left out" in done.stderr


def test_a_model_to_continue(refused: Refused, tmp_path: Path, run: Path, store: Path) -> None:
    shutil.copytree(run, tmp_path / "first")
    training = {"steps": 1, "global_batch_rows": 2, "micro_batch_rows": 2}
    config = {
        "run_dir": str(tmp_path / "second"),
        "model": {"init_from": str(tmp_path / "first")},
        "data": {"store": str(store)},
        "objective": {"inputs_length": 64},
        "training": training,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["pretrain", str(tmp_path / "config.yaml")]
    assert "model.d_ff: cannot be changed together with init_from" in refused([*words, "model.d_ff=96"])
    assert "give either preset" in refused([*words, "model.preset=tiny"])
    damaged = tmp_path / "first" / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    assert "rank-00000.safetensors" in refused(words)
    damaged.write_bytes(whole)
    assert main(words) == 0

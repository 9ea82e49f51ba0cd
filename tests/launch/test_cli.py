"""The commands in the order of the story, from text to a model in Hugging Face's hands; exit codes; help."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.markers import Marker
from packaging.requirements import Requirement
from safetensors.torch import load_file

from spade_t5.checkpoint import latest_checkpoint, list_checkpoints, read_weights, verify_folder
from spade_t5.config import dump_yaml
from spade_t5.hf.loading import load_model, load_tokenizer_of
from spade_t5.hf.tokenizer import model_vocab_size, tokenizer_hash
from spade_t5.launch import cli
from spade_t5.launch.cli import COMMANDS, main
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.pretrain import run as pretrain_run
from spade_t5.pretrain.evaluation import evaluate_held_out
from spade_t5.pretrain.store import TokenStore
from spade_t5.testing import documented, launch_ranks, run_command
from spade_t5.training.reporting import read_metrics

SPADE_T5 = [sys.executable, "-m", "spade_t5.launch"]

FRESH_PROCESS = """
import sys, torch
import spade_t5
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder, out = sys.argv[1:]
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["Return the <extra_id_0> of a JSON document.", "Log it."], padding=True, return_tensors="pt")
options = {"max_new_tokens": 12, "min_new_tokens": 12}
with torch.no_grad():
    torch.manual_seed(0)
    result = {
        "input_ids": batch["input_ids"],
        "logits": model(**batch, decoder_input_ids=torch.tensor([[0, 5, 9], [0, 7, 8]])).logits,
        "greedy": model.generate(**batch, **options),
        "uncached": model.generate(**batch, **options, use_cache=False),
        "beam": model.generate(**batch, **options, num_beams=3),
        "beam_uncached": model.generate(**batch, **options, num_beams=3, use_cache=False),
        "sampled": model.generate(**batch, **options, do_sample=True),
    }
save_file({name: tensor.contiguous() for name, tensor in result.items()}, out)
print(type(model).__name__)
"""


def train_losses(run: Path) -> list[float]:
    return [metrics["loss"] for metrics in read_metrics(run) if metrics["split"] == "train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: spade-t5 {command}")
    assert not err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {summary}" in out for name, summary in COMMANDS.items())


def test_the_store_holds_its_tokenizer(store: Path, tokenizer: Path) -> None:
    opened = TokenStore.open(store)
    assert opened.tokenizer.hash == tokenizer_hash(load_tokenizer_of(tokenizer))
    assert opened.tokenizer.vocab_size == model_vocab_size(load_tokenizer_of(tokenizer))
    assert all(opened.split(name).num_tokens > 1000 for name in ("train", "validation"))


def test_a_run_folder_holds_what_a_run_leaves(run: Path) -> None:
    names = {"config.yaml", "metrics.jsonl", "events.jsonl", "log.txt", "logs", "checkpoints", "tensorboard", "plots"}
    names |= {"tokenizer"}
    assert {path.name for path in run.iterdir()} == names
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert [(m["step"], m["split"]) for m in read_metrics(run) if m["split"] == "validation"] == [
        (3, "validation"),
        (6, "validation"),
    ]
    assert len(train_losses(run)) == 6


def test_a_finished_run_started_again_changes_nothing(
    run: Path, pretrain_words: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def files() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}

    before = files()
    assert main(pretrain_words(run)) == 0
    assert files() == before
    assert "nothing to do: " in caplog.text


def test_resume_from_an_earlier_checkpoint_gives_the_same_losses_and_weights(
    run: Path, tmp_path: Path, pretrain_words: Callable[..., list[str]]
) -> None:
    earlier = run / "checkpoints" / "step-00000003"
    assert main([*pretrain_words(tmp_path / "resumed"), "--resume", str(earlier)]) == 0
    assert train_losses(tmp_path / "resumed") == train_losses(run)[3:]
    weights, resumed = (read_weights(path / "checkpoints" / "step-00000006") for path in (run, tmp_path / "resumed"))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_evaluate_repeats_the_run_s_own_held_out_loss(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--max-rows", "5", "--out", str(tmp_path / "scores")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "scores" / "held_out.json").read_text())
    recorded = [metrics for metrics in read_metrics(run) if metrics["split"] == "validation"][-1]
    assert printed["num_targets"] == recorded["targets"]
    assert printed["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert printed["shuffled_loss"] != printed["loss"]
    assert 0 < printed["unigram_loss"] < printed["loss"]  # six steps beat nothing
    assert evaluate_held_out(run, max_rows=5, batch_rows=2).loss == pytest.approx(printed["loss"], rel=1e-5)


def test_evaluate_asks_again_for_a_url_whose_password_was_not_kept(
    store: Path,
    tmp_path: Path,
    pretrain_words: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "https://ann:s3cret@host/store"  # a relative path to the operating system
    shutil.copytree(store, Path(url))
    assert main(pretrain_words(tmp_path / "run", f"data.store={url}", "training.steps=1")) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--max-rows", "2"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "data.store: was saved as 'https:/***@host/store', without its credentials; give it again as" in message
    documented(message)
    assert main(["evaluate", "run", "--max-rows", "2", f"data.store={url}"]) == 0


def test_the_export_in_a_fresh_process(run: Path, exported: Path, tmp_path: Path) -> None:
    done = run_command([sys.executable, "-c", FRESH_PROCESS, str(exported), str(tmp_path / "out.safetensors")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "SpadeT5ForConditionalGeneration"
    result = load_file(tmp_path / "out.safetensors")

    model, own_tokenizer = load_model(run, SpadeT5ForConditionalGeneration), load_tokenizer_of(run)
    texts = ["Return the <extra_id_0> of a JSON document.", "Log it."]
    batch = own_tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], result["input_ids"])
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=torch.tensor([[0, 5, 9], [0, 7, 8]])).logits
    torch.testing.assert_close(result["logits"], logits, rtol=0, atol=1e-6 * float(logits.abs().max()))
    assert torch.equal(result["greedy"], result["uncached"])
    assert torch.equal(result["beam"], result["beam_uncached"])
    assert all(result[name].shape == (2, 13) for name in ("greedy", "beam", "sampled"))
    assert not torch.equal(result["sampled"], result["greedy"])


def test_what_an_export_holds(exported: Path, run: Path) -> None:
    listed = verify_folder(exported)["files"]
    assert {path.name for path in exported.iterdir()} == {*listed, "manifest.json"}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(listed)
    card = (exported / "README.md").read_text()
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert f"input tokens seen: {state['tokens']:,}" in card
    held_out = [metrics for metrics in read_metrics(run) if metrics["split"] == "validation"][-1]["loss"]
    assert f"held-out loss: {held_out:.4f}" in card


def test_export_of_an_earlier_step_in_shards(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(["export", str(run), "--step", "3", "--max-shard-size", "100KB", "--out", str(out)]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert list(tmp_path.iterdir()) == [out]
    exported, expected = (
        load_model(path, SpadeT5ForConditionalGeneration).state_dict()
        for path in (out, run / "checkpoints" / "step-00000003")
    )
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_generate_reads_lines_and_writes_as_many(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("Return the value.\nA logger.\nParse\n", encoding="utf-8")
    outputs = []
    for model in (run, exported):
        words = ["--input", str(tmp_path / "in.txt"), "--max-new-tokens", "9", "--batch-size", "2"]
        for options in ([], ["--num-beams", "2"], ["--sample", "--temperature", "2.0"]):
            assert main(["generate", str(model), *words, *options]) == 0
            outputs.append(capsys.readouterr().out)
    assert all(len(output.split("\n")) == 4 for output in outputs)
    assert outputs[:2] == outputs[3:5]


@pytest.fixture(scope="module")
def finetuned(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, fine-tuned with dropout for two steps to tell long rows from short ones."""
    folder = tmp_path_factory.mktemp("finetuned")
    rows = [{"text": "a logger " * (1 + i % 2 * 4), "label": "long" if i % 2 else "short"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    files = {"name": "files", "train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl")}
    config = {
        "run_dir": str(folder / "run"),
        "task": {"name": "text-classification", "labels": ["short", "long"], "source": files},
        "model": {"init_from": str(run)},
        "dropout_rate": 0.3,
        "training": {"steps": 2, "global_batch_rows": 4, "micro_batch_rows": 4},
    }
    (folder / "config.yaml").write_text(dump_yaml(config))
    assert main(["finetune", str(folder / "config.yaml")]) == 0
    return folder / "run"


def test_evaluate_a_fine_tuned_run_with_its_own_settings(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finetuned), "--out", str(tmp_path)]) == 0
    scores = json.loads((finetuned / "scores.json").read_text())
    assert json.loads(capsys.readouterr().out) == scores
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    predictions = "predictions/text-classification-validation.jsonl"
    assert (tmp_path / predictions).read_text() == (finetuned / predictions).read_text()
    assert main(["evaluate", str(finetuned), "evaluation.max_examples=6"]) == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == 6


def test_a_run_trained_with_dropout_generates_without(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not load_model(finetuned, SpadeT5ForConditionalGeneration).training
    (tmp_path / "in.txt").write_text("classify text: a logger\n" * 3, encoding="utf-8")
    outputs = []
    for model in (finetuned, finetuned / "model"):
        capsys.readouterr()
        assert main(["generate", str(model), "--input", str(tmp_path / "in.txt"), "--max-new-tokens", "8"]) == 0
        outputs.append(capsys.readouterr().out.splitlines())
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 1


def test_verify_finds_damage(
    run: Path, exported: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    for source, file in (
        (checkpoint, "rank-00000.safetensors"),
        (exported, "model.safetensors"),
        (store, "shard-00000-00000.train.arrow"),
    ):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        assert main(["verify", str(folder)]) == 0
        content = bytearray((folder / file).read_bytes())
        content[-9] ^= 1
        (folder / file).write_bytes(content)
        assert main(["verify", str(folder)]) == 2
        assert file in capsys.readouterr().err


def test_sigterm_stops_at_a_step_boundary_and_the_resumed_run_equals_an_unbroken_one(
    tmp_path: Path, pretrain_words: Callable[..., list[str]]
) -> None:
    stopped, unbroken = tmp_path / "stopped", tmp_path / "unbroken"
    dropout = "model.dropout_rate=0.1"
    common = (
        dropout,
        "training.save_every_steps=null",
        "training.eval_every_steps=null",
        "training.schedule={name: constant}",
    )
    process = subprocess.Popen(
        [*SPADE_T5, *pretrain_words(stopped, *common, "training.steps=100000")], stderr=subprocess.PIPE, text=True
    )
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    step = len(train_losses(stopped))
    assert (
        err.splitlines()[-1]
        == f"spade-t5 pretrain: stopped at step {step} on request; start the same command again to go on"
    )
    assert list_checkpoints(stopped / "checkpoints") == [stopped / "checkpoints" / f"step-{step:08d}"]
    for run_dir in (stopped, unbroken):
        assert main(pretrain_words(run_dir, *common, f"training.steps={step + 2}")) == 0
    assert train_losses(stopped) == train_losses(unbroken)
    weights, expected = (read_weights(path / "checkpoints" / f"step-{step + 2:08d}") for path in (stopped, unbroken))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_1(
    tmp_path: Path, pretrain_words: Callable[..., list[str]]
) -> None:
    words = pretrain_words(
        tmp_path / "run", "training.optimizer={name: sgd, learning_rate: 1.0e+30}", "training.save_every_steps=null"
    )
    done = run_command([*SPADE_T5, *words])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("spade-t5 pretrain: ")
    assert "the gradient is not finite" in last
    documented(last)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def interrupt_start(lease: str | None) -> None:
    """A hook: while the model is built the process is asked to stop, by a user or because its lease is lost."""

    def build(*arguments: object, **options: object) -> None:
        if lease is not None:
            Path(lease).unlink()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("nothing interrupted it")

    pretrain_run.build_model = build  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("lease_is_lost", "code", "message"),
    [
        (False, 75, "spade-t5 pretrain: stopped before or after training; start the same command again to go on"),
        (True, 1, "spade-t5 pretrain: lease: "),
    ],
    ids=["asked", "lease lost"],
)
def test_a_request_to_stop_outside_of_training(
    lease_is_lost: bool, code: int, message: str, tmp_path: Path, pretrain_words: Callable[..., list[str]]
) -> None:
    with launch_ranks(
        pretrain_words(tmp_path / "run"),
        num_ranks=1,
        log_dir=tmp_path / "logs",
        hook=interrupt_start,
        hook_arguments={"lease": str(tmp_path / "run" / "lease.json") if lease_is_lost else None},
    ) as group:
        assert group.wait() == [code], group.stderr(0)
    last = group.stderr(0).splitlines()[-1]
    assert last.startswith(message)
    documented(last)
    assert "Traceback" not in group.stderr(0)


STUCK_WORKER = """
import multiprocessing, os, sys, time
from spade_t5.launch import cli
from spade_t5.training import distributed

def work(rank):
    distributed.begin_worker(rank, 0)
    time.sleep(600)

def run_command():
    multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),), daemon=True).start()
    time.sleep(1)
    return cli.Ending(75)

cli.run_command = run_command
sys.argv = ["spade-t5", "pretrain"]
cli.run_process()
"""


def test_a_process_does_not_wait_for_a_stuck_loader_at_its_end() -> None:
    assert run_command([sys.executable, "-c", STUCK_WORKER], timeout_seconds=120).returncode == 75


def test_a_fault_of_a_thread_is_shown_without_credentials(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert threading.excepthook is cli._show_fault_of_thread
    capsys.readouterr()
    error = RuntimeError("https://ann:secret@host/file is away")
    cli._show_fault_of_thread(threading.ExceptHookArgs((RuntimeError, error, None, None)))
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "RuntimeError: https://***@host/file is away"


def test_ctrl_c_is_one_line_and_exit_code_75(tmp_path: Path) -> None:
    words = ["tokenizer", "corpus.name=pydocs", "vocab_size=8000", f"out={tmp_path / 'tokenizer'}"]
    process = subprocess.Popen(
        [*SPADE_T5, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in the background ignore
    )
    deadline = time.monotonic() + 120
    while b"_sentencepiece" not in Path(f"/proc/{process.pid}/maps").read_bytes():  # the command has begun
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.splitlines()[-1] == "spade-t5 tokenizer: interrupted; start the same command again to go on"
    documented(err)


@pytest.mark.parametrize(
    ("library", "version", "floor"),
    [
        ("torch", "2.10.1", ">=2.11"),
        ("transformers", "5.2.0", ">=5.17"),
        ("sentencepiece", "0.2.0", ">=0.2.1"),
        ("datasets", "3.9", ">=4.0"),
        ("deepspeed", "0.18.9", ">=0.19.6"),
    ],
)
def test_older_libraries_than_the_package_demands_are_refused(
    library: str,
    version: str,
    floor: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, lines in (
        (f"{library}-{version}", [f"Name: {library}", f"Version: {version}"]),
        ("spade_t5-0.0.1", ["Name: spade-t5", "Version: 0.0.1", "Provides-Extra: train", *_demands()]),
    ):
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"spade-t5 verify: {library} {version} is installed, but spade-t5 needs {floor}; run pip install '{library}{floor}'\n"
    )
    documented(err)


def _demands() -> list[str]:
    """What pyproject.toml demands, as an installation's metadata has it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    demands = [Requirement(line) for line in project["dependencies"]]
    for line in project["optional-dependencies"]["train"]:
        demand = Requirement(line)
        marker = 'extra == "train"' if demand.marker is None else f'({demand.marker}) and extra == "train"'
        demand.marker = Marker(marker)
        demands.append(demand)
    return [f"Requires-Dist: {demand}" for demand in demands]

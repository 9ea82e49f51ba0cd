"""Tokens and passwords of the environment and of URLs are in no file that is written and in nothing that is shown."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from spade_t5.config import dump_yaml, to_mapping
from spade_t5.data.bad_rows import BadRows
from spade_t5.errors import DataError
from spade_t5.finetune.task import Row, class_index, field
from spade_t5.launch.cli import main
from spade_t5.messages import (
    MAX_MESSAGE_BYTES,
    OneLineFormatter,
    hide_secrets_of,
    one_line,
    printable,
    show_fault,
    shown,
    without_credentials,
)
from spade_t5.pretrain.corpora import FilesCorpus, HubCorpus
from spade_t5.testing import documented

PASSWORD, SIGNATURE, TOKEN = "s3cretPassw0rd", "s1gnatureOfAnUrl", "hf_" + "T0kenOfTheHub" * 3
URL = f"https://ann:{PASSWORD}@host.example/data?X-Amz-Signature={SIGNATURE}"
SMALL = [
    "model.num_layers=1",
    "model.num_decoder_layers=1",
    "model.d_model=32",
    "model.d_ff=64",
    "training.steps=2",
    "training.global_batch_rows=2",
    "training.micro_batch_rows=2",
    "training.deepspeed=null",
]


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the program's own handlers would write of everything that is logged."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    handler.setFormatter(OneLineFormatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def test_a_whole_story_leaves_no_secret(
    tmp_path: Path,
    tokenizer: Path,
    log: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:{PASSWORD}@127.0.0.1:9")
    # What is a URL to the config is a relative path to the operating system, so it can be had without a network.
    rows = Path(URL) / f"rows-{TOKEN}.jsonl"
    rows.parent.mkdir(parents=True)
    texts = [f"Row number {i} of a corpus with some words in it, enough to be a text of its own." for i in range(200)]
    lines = [json.dumps({"text": text, "label": f"{i % 2}"}) for i, text in enumerate(texts)]
    rows.write_text("\n".join([*lines, "{broken", '{"no": "text"}']) + "\n")
    rows.with_name("good.jsonl").write_text("\n".join(lines) + "\n")
    url = f"{URL}/{rows.name}"

    store, run, tuned, model = (tmp_path / "out" / name for name in ("store", "run", "tuned", "model"))
    corpus = ["corpus.name=files", f"corpus.paths=['{url}']", "held_out_fraction=0.1"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={store}"]) == 0
    pretraining = ["pretrain", "demo", f"run_dir={run}", "objective.inputs_length=32", "data.max_eval_rows=2"]
    assert main([*pretraining, f"data.store={store}", *SMALL]) == 0
    task = {
        "run_dir": str(tuned),
        "task": {
            "name": "text-classification",
            "labels": ["0", "1"],
            "source": {"name": "files", "train": f"{URL}/good.jsonl"},
        },
        "model": {"init_from": str(run)},
        "training": {"steps": 1, "global_batch_rows": 2, "micro_batch_rows": 2, "deepspeed": None},
        "evaluation": {"max_examples": 4},
        "max_train_examples": 8,
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    assert main(["finetune", str(tmp_path / "task.yaml")]) == 0
    assert main(["export", str(run), "--out", str(model)]) == 0
    # and mistakes, whose messages hold what was given
    assert main([*pretraining, f"data.store={URL}/nowhere", *SMALL]) == 2
    assert (
        main(["prepare", "corpus.name=files", f"corpus.paths=[{URL}/nowhere.jsonl]", f"tokenizer={tokenizer}", "out=x"])
        == 2
    )
    assert main(["prepare", *corpus, f"tokenizer={URL}", "out=x"]) == 2
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", "out=x", "--strict"]) == 2
    assert main(["generate", URL, "--input", str(tmp_path / "task.yaml")]) == 2
    assert main(["verify", URL]) == 2
    assert main(["pretrain", f"{URL}/config.yaml"]) == 2
    with pytest.raises(SystemExit):
        main(["verify", str(store), f"--unknown={URL}"])

    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert names >= {
        "manifest.json",
        "quarantine.jsonl",
        "config.yaml",
        "state.json",
        "log.txt",
        "metrics.jsonl",
        "README.md",
    }
    out, err = capfd.readouterr()
    assert "***" in err
    shown_texts = {"stdout": out, "stderr": err, "log": "\n".join(log)}
    for secret in (PASSWORD, SIGNATURE, TOKEN):
        assert not [str(path) for path in written if secret.encode() in path.read_bytes()]
        assert not [name for name, text in shown_texts.items() if secret in text]
        assert not [path for path in (tmp_path / "out").rglob("*") if secret in path.name]
    assert len((store / "quarantine.jsonl").read_text().splitlines()) == 2
    assert "***" in (store / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://ann:pass@host/a", "https://***@host/a"),
        ("see s3://key:p@ss@bucket/x and ftp://u@h", "see s3://***@bucket/x and ftp://***@h"),
        ("https:/ann:pass@host/a", "https:/***@host/a"),
        ("https://host/a?token=abc&part=2", "https://host/a?token=***&part=2"),
        (
            "https://host/a?X-Amz-Signature=abc&X-Amz-Credential=k#f",
            "https://host/a?X-Amz-Signature=***&X-Amz-Credential=***#f",
        ),
        ("https://host/a?api_key=abc&accessToken=k&sig=x", "https://host/a?api_key=***&accessToken=***&sig=***"),
        ("https://u:p/w@host/a and s3://u:a/b/c@bucket", "https://***@host/a and s3://***@bucket"),
        ("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH in text", "hf_*** in text"),
        ("AWS_SECRET_ACCESS_KEY=a/b+c and", "AWS_SECRET_ACCESS_KEY=*** and"),
        ("{'WANDB_API_KEY': 'abc', 'HF_TOKEN': 'x'}", "{'WANDB_API_KEY': '***', 'HF_TOKEN': '***'}"),
        ("WANDB_API_KEY: abc", "WANDB_API_KEY: ***"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("'authorization': 'Basic YW5uOnBhc3M='", "'authorization': 'Basic ***'"),
        ("hf://datasets/owner/name@refs/pr/1/a.jsonl", "hf://datasets/owner/name@refs/pr/1/a.jsonl"),
        ("somebody/model@main", "somebody/model@main"),
        ("a@b.c and x:/y", "a@b.c and x:/y"),
    ],
)
def test_what_is_masked(text: str, expected: str) -> None:
    assert without_credentials(text) == expected
    assert one_line(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "/data/hf_small/rows.jsonl",
        "/data/hf_t5largecheckpoints2026",
        "https://host/a?max_tokens=512&sigma=3&keyframe=7&monkey=1",
        "file:/data@v2/x",
        "file:///data@v2/x",
        "https://host:8080/data@v2/x",
        "TOKENS=3 MAX_TOKENS: 512",
        "--allow-change KEY: a setting",
        "the bearer of news",
    ],
)
def test_what_is_not_masked(text: str) -> None:
    assert without_credentials(text) == text
    assert one_line(text) == text


def test_values_of_secret_variables_are_masked_wherever_they_turn_up() -> None:
    environment = {
        "SOME_API_KEY": "abcdefgh12",
        "DB_PASSWORD": "abcdefgh",
        "PRIVATE_KEY": "-----BEGIN-----\nbase64base64\n",
        "SHORT_TOKEN": "main",
        "KEYBOARD": "qwertyuiop",
    }
    try:
        hide_secrets_of(environment)
        text = "sent abcdefgh12 as abcdefgh to main with base64base64 on qwertyuiop"
        assert without_credentials(text) == "sent *** as *** to main with *** on qwertyuiop"
    finally:
        hide_secrets_of({})
    assert without_credentials(text) == text


def test_the_command_hides_the_secrets_of_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "opaque-value-1")
    try:
        assert main(["verify", "/nowhere/opaque-value-1/x"]) == 2
    finally:
        hide_secrets_of({})
    err = capsys.readouterr().err
    assert "/nowhere/***/x" in err
    assert "opaque" not in err


def test_a_fault_is_shown_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError(f"cannot reach {URL}\nwith {TOKEN}\x1b[2J")
    except RuntimeError:
        show_fault(*sys.exc_info())
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert "RuntimeError: cannot reach https://***@host.example/data?X-Amz-Signature=***\nwith hf_***\\x1b[2J\n" in err
    formatter = OneLineFormatter("%(message)s")
    try:
        raise RuntimeError(URL)
    except RuntimeError:
        record = logging.LogRecord("a", logging.ERROR, "b", 1, "say %s", (TOKEN,), sys.exc_info())
    text = formatter.format(record)
    assert text.startswith("say hf_***\nTraceback")
    assert PASSWORD not in text


def test_dumped_configs_are_masked() -> None:
    for config in (FilesCorpus(paths=(f"{URL}/a.jsonl", "b.jsonl")), HubCorpus(dataset=URL)):
        text = dump_yaml(to_mapping(config))
        assert PASSWORD not in text
        assert "https://***@host.example" in text


HUGE = "x\x1b]0;title\x07\r\n\u2028\u202e" * 100_000


@pytest.mark.parametrize(
    "text", [HUGE, "\x1b[2J", "a\nb", "\0", "\ud800", "\u202e", "a" * 10_000, "é" * 10_000, f"{HUGE}{URL}"]
)
def test_lines_are_printable_and_short(text: str, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        one_line(text),
        shown(text),
        shown({text: [text]}),
        shown([text] * 10_000),
        one_line(f"a {text} b", max_bytes=200),
    ]
    for act in (
        lambda: class_index(text, ["yes"], Row({}, "file line 1"), "task"),
        lambda: field(Row({text: 1}, "file line 1"), "label"),
        lambda: BadRows(strict=True).report("file", 1, "not JSON", detail=text),
    ):
        with pytest.raises(DataError) as caught:
            act()
        line = one_line(str(caught.value))
        documented(line if len(line) < 300 else f"{line[:100]} {line[-100:]}")
        lines.append(line)
    with caplog.at_level(logging.WARNING):
        BadRows().report(f"file {text}", 1, "not JSON", detail=text)
    lines += [OneLineFormatter("%(levelname)s %(message)s").format(record) for record in caplog.records]
    for line in lines:
        assert len(line.encode()) <= MAX_MESSAGE_BYTES
        assert line.isprintable()
        assert PASSWORD not in line
    assert "file" in lines[-1]


def test_what_is_short_and_printable_stays() -> None:
    for text in ("a text, with signs: [1] {2} é 日本", "C:\\path\\file", ""):
        assert one_line(text) == printable(text) == text
    assert shown("yes") == "'yes'"
    assert shown(10**6) == "1000000"


def make_and_export(folder: Path, tokenizer: Path) -> None:
    """A store, a run and an exported model, all in one folder."""
    store, run = folder / "store", folder / "run"
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={store}"]) == 0
    words = ["pretrain", "demo", f"run_dir={run}", f"data.store={store}", "objective.inputs_length=32"]
    assert main([*words, "data.max_eval_rows=2", *SMALL]) == 0
    assert main(["export", str(run), "--out", str(folder / "model")]) == 0


def test_files_are_not_writable_for_everybody(tmp_path: Path, tokenizer: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "out"
        make_and_export(folder, tokenizer)
    finally:
        os.umask(before)
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    assert len(found) > 20
    assert not [str(path) for path in found if path.stat().st_mode & 0o002]


def test_nothing_is_written_outside_of_what_was_named(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    refuse_writes: Callable[[Sequence[Path]], list[str]],
) -> None:
    """Not beside the folder, not in the working directory, not in /tmp."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    foreign = refuse_writes([tmp_path / "out"])
    make_and_export(tmp_path / "out", tokenizer)
    assert not foreign
    assert not list(elsewhere.iterdir())

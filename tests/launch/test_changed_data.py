"""Data that changed under a run: refused at the next start, with what changed; data that only lies elsewhere goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.launch.cli import main
from spade_t5.testing import documented

Words = Callable[..., list[str]]
Outcome = Callable[[list[str]], str]


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Outcome:
    """Runs a command; returns the line that it was refused with, or nothing."""

    def run(words: list[str]) -> str:
        capsys.readouterr()
        code = main(words)
        line = capsys.readouterr().err
        assert (code == 0) == (line == "")
        assert code in (0, 2)
        if line:
            assert line.count("\n") == 1
        return line

    return run


def test_a_store_made_anew_is_another_and_a_copy_is_the_same(
    run: Path, store: Path, tokenizer: Path, tmp_path: Path, pretrain_words: Words, outcome: Outcome
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(store, tmp_path / "copy")
    assert outcome(pretrain_words(tmp_path / "run", f"data.store={tmp_path / 'copy'}")) == ""
    corpora = {"reordered": "[argparse,textwrap,json,logging]", "removed": "[json,logging,argparse]"}
    corpora |= {"replaced": "[json,logging,argparse,csv]", "grown": "[json,logging,argparse,textwrap,csv]"}
    for name, packages in corpora.items():
        other = tmp_path / name
        words = ["prepare", "corpus.name=pydocs", f"corpus.packages={packages}", f"tokenizer={tokenizer}"]
        assert main([*words, f"out={other}"]) == 0
        line = outcome(pretrain_words(tmp_path / "run", f"data.store={other}"))
        assert "data_fingerprint.stores[0]: was '" in line
        assert "a resumed run cannot change it" in line
        documented(line)


def test_a_shard_that_was_replaced_removed_or_grown_is_named(
    run: Path, store: Path, tmp_path: Path, pretrain_words: Words, outcome: Outcome
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(store, tmp_path / "store")
    shard = next((tmp_path / "store").glob("*.train.arrow"))
    content = shard.read_bytes()
    words = pretrain_words(tmp_path / "run", f"data.store={tmp_path / 'store'}")
    for changed in (content + b"x", content[:-1], None):
        shard.unlink(missing_ok=True)
        if changed is not None:
            shard.write_bytes(changed)
        assert shard.name in outcome(words)


def test_the_stores_of_a_mixture_keep_their_places(
    store: Path, tokenizer: Path, tmp_path: Path, pretrain_words: Words, outcome: Outcome
) -> None:
    other = tmp_path / "other"
    corpus = ["corpus.name=pydocs", "corpus.packages=[argparse,textwrap,json,logging]"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={other}"]) == 0

    def words(*stores: Path) -> list[str]:
        mixture = ", ".join(f"{{store: {each}, rate: 1.0}}" for each in stores)
        return pretrain_words(tmp_path / "run", "data.store=null", f"data.mixture=[{mixture}]", "training.steps=2")

    assert outcome(words(store, other)) == ""
    assert outcome(words(store, other)) == ""
    for stores, entry in (((other, store), "stores[0]: was '"), ((store,), "stores[1]: was '")):
        line = outcome(words(*stores))
        assert f"data_fingerprint.{entry}" in line
        documented(line)


def test_the_files_of_a_stream(tokenizer: Path, tmp_path: Path, pretrain_words: Words, outcome: Outcome) -> None:
    texts = [f"Document {i} tells of {i * i} things, and of a few more that it does not count. " * 9 for i in range(60)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    files = {name: "".join(lines[start::3]) for start, name in enumerate(("a.jsonl", "b.jsonl"))}
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    def words(*names: str) -> list[str]:
        paths = ", ".join(str(tmp_path / name) for name in names)
        corpus = f"{{name: files, paths: [{paths}]}}"
        data = f"data={{name: streaming, tokenizer: {tokenizer}, lanes: 1, max_eval_rows: 2, held_out_fraction: 0.3, corpus: {corpus}}}"
        settings = [word for word in pretrain_words(tmp_path / "run") if not word.startswith("data.")]
        return [*settings, data, "training.steps=2", "training.save_every_steps=1"]

    assert outcome(words("a.jsonl", "b.jsonl")) == ""
    assert outcome(words("a.jsonl", "b.jsonl")) == ""
    line = outcome(words("a.jsonl"))
    assert "data_fingerprint.num_files: was 2 in the checkpoint, is 1 now" in line
    documented(line)
    assert "data_fingerprint.corpus: was '" in outcome(words("b.jsonl", "a.jsonl"))
    for change in (files["b.jsonl"] + lines[2], files["b.jsonl"][: len(lines[1])]):
        (tmp_path / "b.jsonl").write_text(change)
        assert "data_fingerprint.num_bytes: was " in outcome(words("a.jsonl", "b.jsonl"))

"""What the commands make of a few documented modules: tokenizer, token store and a pretrained run of a very small model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.launch.cli import main

CORPUS = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
SETTINGS = [
    "model.num_layers=1",
    "model.num_decoder_layers=1",
    "model.d_model=32",
    "model.d_ff=64",
    "objective.inputs_length=64",
    "data.max_eval_rows=5",
    "training.steps=6",
    "training.global_batch_rows=4",
    "training.micro_batch_rows=2",
    "training.save_every_steps=3",
    "training.eval_every_steps=3",
    "training.deepspeed=null",
    "training.optimizer={name: adamw, learning_rate: 4.0e-3}",
    "training.schedule={name: linear, warmup_steps: 3}",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    assert main(["tokenizer", *CORPUS, "vocab_size=600", "num_sentinels=40", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    assert main(["prepare", *CORPUS, f"tokenizer={tokenizer}", f"out={out}"]) == 0
    return out


@pytest.fixture(scope="session")
def pretrain_words(store: Path) -> Callable[..., list[str]]:
    """Makes the words of a small pretraining command; later words go over earlier ones."""

    def make(run_dir: Path, *words: str) -> list[str]:
        return ["pretrain", "demo", f"run_dir={run_dir}", f"data.store={store}", *SETTINGS, *words]

    return make


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, pretrain_words: Callable[..., list[str]]) -> Path:
    """A run of six steps with checkpoints at steps 3 and 6; tests that change it work on a copy."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    assert main(pretrain_words(run_dir)) == 0
    return run_dir


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out

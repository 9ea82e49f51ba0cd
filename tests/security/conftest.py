"""Files that somebody else made: payloads that would run on unpickling, and small models to hide them in."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.launch.cli import main
from spade_t5.testing import documented

SIZES: dict[str, Any] = {
    "vocab_size": 768,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "local_radius": 3,
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload makes; that payloads work is seen first, that none ran, last."""
    path = tmp_path / "payload-has-run"
    pickle.loads(pickle.dumps(Payload(path))).close()
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture
def payload(marker: Path) -> bytes:
    """A pickle that makes the marker."""
    return pickle.dumps(Payload(marker))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str | Path]], str]:
    """Runs a command that must end with exit code 2 and one line that the failure cookbook knows; returns the line."""

    def run(words: Sequence[str | Path]) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spade-t5 ")]
        assert len(lines) == 1
        documented(lines[0])
        return lines[0]

    return run


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    words = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse]", "vocab_size=600", "num_sentinels=40"]
    assert main(["tokenizer", *words, f"out={out}"]) == 0
    return out


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer: Path) -> Path:
    """An exported model with its tokenizer, to be tampered with."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", **SIZES)).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to generate from."""
    path = tmp_path / "text.txt"
    path.write_text("a text\n")
    return path


_watched: list[tuple[list[Path], list[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which cannot be removed: it looks for those who are being watched."""
    if not _watched or event not in ("open", "os.mkdir", "os.rename", "shutil.copyfile"):
        return
    if event == "open":
        path, mode, flags = arguments
        if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
    else:
        path = arguments[0] if event == "os.mkdir" else arguments[1]
    if isinstance(path, int):
        return
    real = Path(os.fsdecode(path)).absolute()
    for allowed, foreign in _watched:
        if not any(real.is_relative_to(folder) for folder in [*allowed, Path("/dev"), Path("/proc")]):
            foreign.append(f"{event} {real}")


@pytest.fixture
def refuse_writes() -> Iterator[Callable[[Sequence[Path]], list[str]]]:
    """Begins to note what is written outside of some folders; returns the list that fills."""
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)

    def begin(folders: Sequence[Path]) -> list[str]:
        foreign: list[str] = []
        _watched.append((list(folders), foreign))
        return foreign

    yield begin
    _watched.clear()


_hooked: list[bool] = []

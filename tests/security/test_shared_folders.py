"""Folders that others may write to, such as /tmp: nothing of theirs is followed or taken for ours."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.errors import DataError
from spade_t5.launch.cli import main
from spade_t5.pretrain.staging import stage
from spade_t5.pretrain.store import TokenStore
from spade_t5.testing import documented

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def store(tmp_path: Path, tokenizer: Path) -> Path:
    out = tmp_path / "store"
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={out}"]) == 0
    return out


@pytest.fixture
def names(tmp_path: Path, store: Path) -> Callable[[str], Path]:
    """Where a copy of the store and what belongs to it would lie in the shared folder."""
    (tmp_path / "shared").mkdir()
    copy = f"store-{TokenStore.open(store).identity[:16]}"
    return lambda form: tmp_path / "shared" / form.format(copy)


def refused(store: Path, folder: Path) -> str:
    with pytest.raises(DataError, match="staging_dir: ") as caught:
        stage(store, folder)
    return str(caught.value)


def test_a_link_in_place_of_the_lock(tmp_path: Path, store: Path, names: Callable[[str], Path]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of mine")
    names(".{}.lock").symlink_to(victim)
    refused(store, tmp_path / "shared")
    assert victim.read_text() == "of mine"


@pytest.mark.parametrize("form", [".{}.partial", "{}"])
def test_a_link_in_place_of_the_copy(form: str, tmp_path: Path, store: Path, names: Callable[[str], Path]) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    names(form).symlink_to(victim)
    documented(refused(store, tmp_path / "shared"))
    assert not list(victim.iterdir())


@needs_root
@pytest.mark.parametrize("form", [".{}.partial", "{}"])
def test_a_copy_of_another_user(form: str, tmp_path: Path, store: Path, names: Callable[[str], Path]) -> None:
    if form == "{}":
        assert stage(store, tmp_path / "shared") == names(form)
    else:
        names(form).mkdir()
    os.chown(names(form), 12345, 12345)
    documented(refused(store, tmp_path / "shared"))


def test_a_converted_model_can_be_verified(model_folder: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=768, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (model_folder / file).unlink()
    T5ForConditionalGeneration(config).save_pretrained(model_folder)
    out = tmp_path / "converted"
    assert main(["convert", str(model_folder), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["verify", str(out)]) == 2
    assert main(["convert", str(model_folder), "--out", "/proc/nothing/here"]) == 2

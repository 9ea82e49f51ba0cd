"""Token stores from others: manifests that lie with the right hash, and shards that point outside of themselves."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spade_t5.errors import DataError, UserError
from spade_t5.launch.cli import main
from spade_t5.pretrain.store import TokenStore, read_manifest, write_manifest
from spade_t5.testing import documented

VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "a\nb", "a\0b", "x" * 5000, [], [1], {}, {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={out}"]) == 0
    return out


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def test_manifests_that_lie(store: Path, tmp_path: Path) -> None:
    for file in store.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "manifest.json").unlink()
    whole = read_manifest(store)
    random_ = random.Random(0)
    refusals: list[str] = []
    for _ in range(600):
        manifest = copy.deepcopy(whole)
        *way, last = random_.choice(places(manifest))
        node = manifest
        for key in way:
            node = node[key]
        if random_.random() < 0.2 and isinstance(node, dict):
            del node[last]
        else:
            node[last] = random_.choice(VALUES)
        write_manifest(tmp_path, manifest)
        try:
            opened = TokenStore.open(tmp_path)
            for name in ("train", "validation"):
                opened.split(name).check_counts()
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    for refusal in refusals:
        assert len(refusal) < 2000
        documented(refusal)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"splits": ' + "9" * 5000 + "}", "", "null", "[]", '{"format": "\x1b"}']
)
def test_manifests_that_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError) as caught:
        TokenStore.open(tmp_path)
    documented(str(caught.value))
    assert str(caught.value).isprintable()
    assert main(["verify", str(tmp_path)]) == 2


def test_a_large_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="damaged or not readable"):
        TokenStore.open(tmp_path)


def test_shards_that_point_outside_of_themselves(store: Path, tmp_path: Path) -> None:
    """A thousand changed bytes in the description of a shard, which Arrow follows: an error or tokens, never a crash."""
    manifest = json.loads((store / "manifest.json").read_text())
    (shard,) = manifest["splits"]["train"]
    content = (store / shard["file"]).read_bytes()
    (tmp_path / "manifest.json").write_bytes((store / "manifest.json").read_bytes())
    for other in manifest["splits"]["validation"]:
        (tmp_path / other["file"]).symlink_to(store / other["file"])
    random_ = random.Random(0)
    # The flat tokens are most of a shard; what Arrow follows stands in front of them and behind.
    described = [*range(1200), *range(len(content) - 1200, len(content))]
    refusals = 0
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(random_.choice((1, 1, 4))):
            changed[random_.choice(described)] = random_.choice((0, 1, 0x7F, 0x80, 0xFF))
        (tmp_path / shard["file"]).unlink(missing_ok=True)
        (tmp_path / shard["file"]).write_bytes(changed)
        split = TokenStore.open(tmp_path).split("train")
        try:
            tokens = split.tokens(0, split.num_tokens)
            split.document(split.num_documents - 1)
            int(np.asarray(tokens).sum())
        except DataError as error:
            refusals += 1
            documented(str(error))
    assert refusals > 100

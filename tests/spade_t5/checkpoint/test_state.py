"""`state.json` is not trusted: whatever it says, it is taken as it was meant or refused by name."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spade_t5.checkpoint import load_checkpoint, read_state, read_weights, verify_checkpoint
from spade_t5.checkpoint.manifest import content_hash
from spade_t5.errors import DataError
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import forge, save, tiny_backend, train

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**70, 1.5, 1e400, "", "x", "../x", "rank-00000.safetensors", "\x00\x1b[2J\n",
    [], [[]], [1, 2, 3], {}, {"weight": 3}, ["frozen.safetensors", 0, 6],
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = tiny_backend()
    train(trained, [1])
    config = {"training": {"seed": 1}}
    return save(tmp_path_factory.mktemp("state"), trained, 1, config=config, model_class="Tied").path


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a JSON tree stands."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def mutated(tree: Any, draw: random.Random) -> Any:
    """A copy in which one value is another, missing, or there twice."""
    tree = json.loads(json.dumps(tree))
    *parents, last = draw.choice(places(tree)[1:])
    container = tree
    for key in parents:
        container = container[key]
    kind = draw.choice(["replace", "replace", "delete", "repeat"])
    if kind == "delete":
        del container[last]
    elif kind == "repeat" and isinstance(container, list):
        container.append(container[last])
    else:
        container[last] = draw.choice(JUNK)
    return tree


def refusal(checkpoint: Path, *, is_verified: bool = True) -> str | None:
    """Why a checkpoint is refused, if it is."""
    try:
        read_weights(checkpoint)
        state = load_checkpoint(checkpoint, tiny_backend(), is_verified=is_verified)
        state["tokens"]
    except DataError as error:
        return str(error)
    return None


def test_a_thousand_mutations(checkpoint: Path) -> None:
    original = (checkpoint / "state.json").read_text()
    draw = random.Random(0)
    refusals = set()
    for _ in range(1000):
        tree = mutated(json.loads(original), draw)
        (checkpoint / "state.json").write_text(json.dumps(tree))
        message = refusal(checkpoint)
        if message is not None:
            refusals.add(message)
            assert message.startswith(str(checkpoint))
            assert message.isprintable()
            assert len(message) < 1000
    (checkpoint / "state.json").write_text(original)
    assert len(refusals) > 200
    for message in refusals:
        documented(message)
    assert refusal(checkpoint) is None


def test_mutated_manifests_and_headers(checkpoint: Path, tmp_path: Path) -> None:
    """A forger makes the hashes agree; what is then read still makes sense, or is refused."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    contents = json.loads((copy / "manifest.json").read_text())
    contents.pop("sha256")
    tensors = copy / "rank-00000.safetensors"
    original = tensors.read_bytes()
    header_bytes = int.from_bytes(original[:8], "little")
    draw = random.Random(0)
    refusals = set()
    for number in range(300):
        if number % 2:
            text = bytearray(original)
            text[draw.randrange(8 + header_bytes)] = draw.randrange(256)
            tensors.write_bytes(text)
            forge(copy)
        else:
            tensors.write_bytes(original)
            facts = mutated(contents, draw)
            text = json.dumps({**facts, "sha256": content_hash(facts)}, indent=1).encode()
            (copy / "manifest.json").write_bytes(text)
        message = refusal(copy, is_verified=False)
        if message is not None:
            refusals.add(message)
            assert message.startswith(str(copy))
            assert message.isprintable()
        (copy / "manifest.json").write_bytes((checkpoint / "manifest.json").read_bytes())
    assert len(refusals) > 30
    for message in refusals:
        documented(message)


@pytest.mark.parametrize(
    "text",
    ["", "nul", "[]", "3", '{"format_version": 1', "[" * 100_000, '{"format_version": 2}', "{}", "\ufeff{}"],
    ids=len,
)
def test_text_that_is_no_state(text: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DataError, match=r"state\.json") as refusal:
        read_state(tmp_path)
    documented(str(refusal.value))


def test_a_state_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "state.json").open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(DataError, match="missing or unreadable"):
        read_state(tmp_path)


def test_keys_that_an_older_version_did_not_write(checkpoint: Path) -> None:
    state = read_state(checkpoint)
    with pytest.raises(DataError, match="does not hold 'cursor', it was written by another version") as refusal:
        state["cursor"]
    documented(str(refusal.value))
    assert state.get("cursor") is None


def test_pieces_must_cover_a_parameter(checkpoint: Path, tmp_path: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    for pieces in (
        [["rank-00000.safetensors", 0, 35]],
        [["rank-00000.safetensors", 1, 36]],
        [["rank-00000.safetensors", 0, 36], ["frozen.safetensors", 30, 6]],
        [["rank-00000.safetensors", 0, 18], ["rank-00000.safetensors", 18, 18]],
        [],
    ):
        state["index"]["weight"]["first.weight"] = pieces
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(DataError, match=r"index: 'first\.weight' has") as refusal:
            read_state(tmp_path)
        documented(str(refusal.value))


def test_the_index_must_agree_with_the_headers(checkpoint: Path, tmp_path: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    shapes = {**state["shapes"], "first.bias": [2**40]}
    index = {"weight": {**state["index"]["weight"], "first.bias": [["rank-00000.safetensors", 0, 2**40]]}}
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    forge(copy, {"shapes": shapes, "index": index})
    with pytest.raises(DataError, match=r"rank-00000\.safetensors: weight/first\.bias has 6 elements") as refusal:
        verify_checkpoint(copy)
    documented(str(refusal.value))
    with pytest.raises(DataError, match="has 6 elements"):
        read_weights(copy)


def test_a_checkpoint_moved_into_the_folder_of_another_step(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-00000002"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    forge(copy, step=2)
    with pytest.raises(DataError, match="is that of step 1, the manifest of another") as refusal:
        verify_checkpoint(copy)
    documented(str(refusal.value))


def test_facts_are_as_they_were(checkpoint: Path) -> None:
    state = read_state(checkpoint)
    assert state["config"] == {"training": {"seed": 1}}
    assert torch.equal(read_weights(checkpoint)["count"], torch.arange(3.0))

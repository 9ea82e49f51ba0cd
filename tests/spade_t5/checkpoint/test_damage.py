"""Torn and tampered checkpoints: each is rejected by name, the one before is used, and a run never starts from scratch instead."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spade_t5.checkpoint import (
    checkpoint_folders,
    load_checkpoint,
    manifest,
    newest_good_checkpoint,
    verify_checkpoint,
)
from spade_t5.checkpoint.manifest import read_manifest, write_manifest
from spade_t5.errors import DataError
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import forge, save, tiny_backend, train

FILES = ["rank-00000.safetensors", "frozen.safetensors", "state.json", "manifest.json"]
STRANGER = 54321


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("damage") / "run"
    trained = tiny_backend()
    for step in (1, 2, 3):
        train(trained, [step])
        save(run / "checkpoints", trained, step)
    return run


@pytest.fixture
def checkpoints(pristine: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(pristine, tmp_path / "run")) / "checkpoints"


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def extend(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def swap(file: Path) -> None:
    """With the one of the checkpoint before; frozen weights, which are the same there, with those that train."""
    other = file.parent / FILES[0] if file.name == FILES[1] else file.parent.with_name("step-00000002") / file.name
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def link(file: Path) -> None:
    """The right content, but elsewhere."""
    elsewhere = file.parents[2] / file.name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


DAMAGES: list[Callable[[Path], None]] = [halve, empty, zero, Path.unlink, extend, swap, link]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_one_before_is_used(
    damage: Callable[[Path], None], name: str, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints / "step-00000003" / name)
    expected = "step-00000001" if damage is swap and name != FILES[1] else "step-00000002"
    assert newest_good_checkpoint(checkpoints) == checkpoints / expected
    *rejections, going_back = [record.getMessage() for record in caplog.records]
    assert "step-00000003" in rejections[0]
    swapped = damage is swap and name == FILES[1]
    assert name in rejections[0] or (swapped and FILES[0] in rejections[0])
    for message in (*rejections, going_back):
        documented(message)
        documented(message.partition(": ")[2] or message)


def test_every_flipped_bit_is_found_and_named(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = checkpoints / "step-00000003"
    contents = {name: (newest / name).read_bytes() for name in FILES}
    draw = random.Random(0)
    for number in range(200):
        name = FILES[number % len(FILES)]
        content = bytearray(contents[name])
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(content)
        caplog.clear()
        assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002", f"{name}, byte {place}"
        assert str(newest / name) in caplog.messages[0]
        documented(caplog.messages[0].partition(": ")[2])
        (newest / name).write_bytes(contents[name])
    assert newest_good_checkpoint(checkpoints) == newest


def test_a_file_that_does_not_belong_there(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = checkpoints / "step-00000003"
    (newest / ".nfs0001").touch()
    assert newest_good_checkpoint(checkpoints) == newest
    (newest / "rank-00001.safetensors").write_bytes((newest / FILES[0]).read_bytes())
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    assert "rank-00001.safetensors" in caplog.messages[0]
    documented(caplog.messages[0])


def test_never_from_scratch(checkpoints: Path) -> None:
    for path in checkpoint_folders(checkpoints):
        (path / "manifest.json").unlink()
    with pytest.raises(
        DataError, match=r"holds 3 checkpoints and none is good, the newest: .*step-00000003"
    ) as refusal:
        newest_good_checkpoint(checkpoints)
    documented(str(refusal.value))
    shutil.rmtree(checkpoints)
    assert newest_good_checkpoint(checkpoints) is None


def test_a_renamed_checkpoint_is_not_newer(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoints / "step-00000001").rename(checkpoints / "step-00000009")
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000003"
    documented(caplog.messages[0])


def test_a_linked_checkpoint_is_refused(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoints / "step-00000003").rename(checkpoints.parent / "elsewhere")
    (checkpoints / "step-00000003").symlink_to(checkpoints.parent / "elsewhere")
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    documented(caplog.messages[0])


@pytest.fixture
def stranger(checkpoints: Path) -> int:
    """Another user, who owns the newest checkpoint."""
    try:
        os.chown(checkpoints / "step-00000003", STRANGER, -1)
    except OSError as error:
        pytest.skip(f"giving files to another user is not permitted here: {error.strerror}")
    return STRANGER


def test_a_checkpoint_of_a_stranger_is_refused(
    stranger: int, checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    documented(caplog.messages[0])
    os.chown(checkpoints.parent, stranger, -1)  # the owner of the run folder is no stranger
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000003"


def test_a_file_of_a_stranger_is_refused(stranger: int, checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.chown(checkpoints / "step-00000003", os.geteuid(), -1)
    os.chown(checkpoints / "step-00000003" / FILES[0], stranger, -1)
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    assert FILES[0] in caplog.messages[0]


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("is_forged", [False, True], ids=["plain", "forged"])
@pytest.mark.parametrize("name", FILES)
def test_a_payload_never_runs(name: str, is_forged: bool, checkpoints: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    newest = checkpoints / "step-00000003"
    torch.save(Payload(marker), tmp_path / "payload")
    torch.load(tmp_path / "payload", weights_only=False)
    assert marker.is_dir(), "the payload works"
    marker.rmdir()
    (newest / name).write_bytes((tmp_path / "payload").read_bytes())
    if is_forged and name != "manifest.json":
        forge(newest)
    with pytest.raises(DataError, match=name) as refusal:
        load_checkpoint(newest, tiny_backend())
    documented(str(refusal.value))
    with pytest.raises(DataError, match=name):
        verify_checkpoint(newest)
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", "..", ".", "", "a\nb"])
def test_names_that_leave_the_folder_are_refused(name: str, checkpoints: Path) -> None:
    newest = checkpoints / "step-00000003"
    shapes = {"first.weight": [6, 6], "first.bias": [6], "second.bias": [6]}
    index = {"weight": {key: [[name, 0, 36 if key == "first.weight" else 6]] for key in shapes}}
    forge(newest, {"index": index})
    with pytest.raises(DataError, match=r"index: .* not a plain file name") as refusal:
        verify_checkpoint(newest)
    documented(str(refusal.value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_other_names_that_leave_the_folder_are_refused(name: str, checkpoints: Path) -> None:
    newest = checkpoints / "step-00000003"
    forge(newest, {"whole": {"factor": {"first.bias": name}}})
    with pytest.raises(DataError, match=r"whole: .* not a plain file name") as refusal:
        verify_checkpoint(newest)
    documented(str(refusal.value))
    entries = read_manifest(newest)["files"]
    (newest / "manifest.json").unlink()
    write_manifest(newest, {**entries, name: entries[FILES[0]]}, kind="checkpoint", step=3)
    with pytest.raises(DataError, match=r"manifest\.json: names .* not a plain file name") as refusal:
        verify_checkpoint(newest)
    documented(str(refusal.value))


def test_a_manifest_of_something_else(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000003"
    (newest / "frozen.safetensors").unlink()
    forge(newest)
    with pytest.raises(DataError, match=r"does not list frozen\.safetensors") as refusal:
        verify_checkpoint(newest)
    documented(str(refusal.value))


def test_a_disk_that_cannot_be_read(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hash_file = manifest.file_sha256

    def fail(path: Path) -> str:
        if path.parent.name == "step-00000003":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return hash_file(path)

    monkeypatch.setattr(manifest, "file_sha256", fail)
    assert newest_good_checkpoint(checkpoints) == checkpoints / "step-00000002"
    assert "cannot be read (Input/output error)" in caplog.messages[0]
    documented(caplog.messages[0])
    documented(caplog.messages[0].removeprefix("rejected step-00000003: "))


def test_a_file_that_is_not_in_the_manifest_is_not_read(checkpoints: Path) -> None:
    newest = checkpoints / "step-00000003"
    forge(newest, {"whole": {"factor": {"first.bias": "ghost.safetensors"}}})
    with pytest.raises(DataError, match=r"names 'ghost\.safetensors', which is not in the manifest") as refusal:
        verify_checkpoint(newest)
    documented(str(refusal.value))

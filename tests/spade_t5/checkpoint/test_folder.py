"""What lies beside the checkpoints: unfinished, replaced and abandoned ones; and whether there is room."""

import os
import shutil
from pathlib import Path

import pytest

from spade_t5.checkpoint import (
    check_free_space,
    checkpoint_folders,
    list_checkpoints,
    newest_good_checkpoint,
    remove_unfinished,
    set_aside_newer,
)
from spade_t5.errors import ConfigError
from spade_t5.testing import documented
from spade_t5.testing.checkpoints import save, tiny_backend


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    for step in (1, 2, 3):
        save(folder, tiny_backend(), step)
    return folder


@pytest.fixture
def folder(start: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(start, tmp_path / "checkpoints"))


def test_only_names_of_checkpoints_count(folder: Path) -> None:
    for name in ("step-4", "step-000000005", "step-00000006.abandoned", "step-0000000x", ".step-00000007.tmp", "notes"):
        (folder / name).mkdir()
    (folder / "step-123456789").mkdir()
    assert [path.name for path in checkpoint_folders(folder)] == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
        "step-123456789",
    ]
    assert len(list_checkpoints(folder)) == 3
    assert checkpoint_folders(folder / "none") == []


def test_what_a_kill_left_is_removed_and_its_length_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".step-00000004.tmp", ".step-00000005.tmp", ".step-00000001.deleted", ".other.tmp"):
        (folder / name).mkdir()
        (folder / name / "x").touch()
    started, last = folder / ".step-00000004.tmp" / ".started", folder / ".step-00000004.tmp" / "x"
    started.touch()
    os.utime(started, (1_000_000, 1_000_000))
    os.utime(last, (1_000_037.5, 1_000_037.5))
    remove_unfinished(folder)
    assert sorted(os.listdir(folder)) == [".other.tmp", "step-00000001", "step-00000002", "step-00000003"]
    first, second = caplog.messages
    assert "the save was cut off after 37.5 s" in first
    assert ".step-00000005.tmp: removed, the save was cut off;" in second
    for message in caplog.messages:
        documented(message)


def test_a_checkpoint_that_was_to_be_replaced_gets_its_name_back(folder: Path) -> None:
    (folder / "step-00000003").rename(folder / ".step-00000003.replaced")
    assert newest_good_checkpoint(folder) == folder / "step-00000002"  # nothing is changed by looking
    assert len(list_checkpoints(folder)) == 2
    remove_unfinished(folder)
    assert newest_good_checkpoint(folder) == folder / "step-00000003"
    (folder / ".step-00000003.replaced").mkdir()
    remove_unfinished(folder)
    assert len(os.listdir(folder)) == 3


def test_newer_ones_are_set_aside_for_good(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [path.name for path in set_aside_newer(folder, 1)] == ["step-00000003.abandoned", "step-00000002.abandoned"]
    assert newest_good_checkpoint(folder) == folder / "step-00000001"
    for message in caplog.messages:
        documented(message)
    save(folder, tiny_backend(), 2)
    assert [path.name for path in set_aside_newer(folder, 1)] == ["step-00000002.abandoned.2"]
    assert set_aside_newer(folder, 1) == []


def test_newer_ones_that_a_kill_leaves_are_the_older_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename_once_and_die(source: Path, target: Path) -> None:
        monkeypatch.undo()
        os.rename(source, target)
        monkeypatch.setattr(os, "rename", die)

    def die(*names: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename_once_and_die)
    with pytest.raises(KeyboardInterrupt):
        set_aside_newer(folder, 1)
    assert newest_good_checkpoint(folder) == folder / "step-00000002"


def test_room_for_two(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1000)
    with pytest.raises(
        ConfigError, match="bytes free, the next 2 checkpoints need 2,000,000,000,000,000; free space"
    ) as refusal:
        check_free_space(tmp_path, 10**15)
    documented(str(refusal.value))
    for step in (1, 2, 3):
        save(tmp_path, tiny_backend(), step)
    with pytest.raises(ConfigError, match="the next 1 checkpoints need 1,000,000,000,000,000"):
        check_free_space(tmp_path, 10**15)

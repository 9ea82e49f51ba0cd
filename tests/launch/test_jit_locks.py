"""A build of an extension that was killed keeps nobody waiting."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError
from spade_t5.launch.jit_locks import clear_stale_locks
from spade_t5.testing import documented

BUILD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("builds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An extensions folder with room for one extension."""
    (tmp_path / "deepspeed_shm_comm").mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_the_lock_of_a_living_build_stays_and_that_of_a_killed_one_goes(
    extensions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = extensions / "deepspeed_shm_comm" / "lock"
    build = subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert build.stdout is not None
        assert build.stdout.readline() == "builds\n"
        with caplog.at_level("INFO", "spade_t5"):
            clear_stale_locks()
        assert lock.exists()
        assert f"{lock}: process {build.pid} builds an extension" in caplog.text
        documented(caplog.messages[0])
    finally:
        build.kill()
        build.communicate()
    caplog.clear()
    clear_stale_locks()
    assert not lock.exists()
    assert caplog.messages == [f"{lock}: removed, the build that left it is gone"]
    documented(caplog.messages[0])
    clear_stale_locks()  # nothing is there any more


@pytest.fixture
def foreign(extensions: Path) -> Iterator[Path]:
    """An extension's folder on a file system that is not known to be local."""
    folder = extensions / "deepspeed_shm_comm"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "ramfs", "ramfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_lock_on_a_shared_disk_is_refused_with_its_path(foreign: Path) -> None:
    (foreign / "lock").touch()
    with pytest.raises(ConfigError, match=re.escape(f"{foreign / 'lock'}: a build of an extension")) as caught:
        clear_stale_locks()
    documented(str(caught.value))
    assert (foreign / "lock").exists()

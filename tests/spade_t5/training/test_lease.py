"""Of several processes that want a run folder one has it, whatever happens to the others."""

import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spade_t5.checkpoint.manifest import whole_file
from spade_t5.errors import ConfigError, RunAbortedError
from spade_t5.testing import call_on_ranks, disks, documented
from spade_t5.training.lease import LEASE_FILE, Holder, Lease
from spade_t5.training.watchdog import process_start


@contextmanager
def lease(folder: Path, **options: Any) -> Iterator[Lease]:
    """A lease that is taken and given back."""
    taken = Lease(folder, **{"on_loss": lambda: None, **options})
    taken.take()
    try:
        yield taken
    finally:
        taken.release()


def write(folder: Path, **fields: Any) -> None:
    """The lease file of this process's machine with some fields changed."""
    holder = dataclasses.asdict(Holder.this_process()) | fields
    with whole_file(folder / LEASE_FILE) as file:
        file.write(json.dumps(holder).encode())


def refusal(folder: Path, **options: Any) -> str:
    """What a second holder is refused with, within the time that a user may be kept waiting."""
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        Lease(folder, on_loss=lambda: None, **options).take()
    assert time.monotonic() - started < 5
    documented(str(caught.value))
    return str(caught.value)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_lease_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    with lease(tmp_path) as held:
        fields = json.loads((tmp_path / LEASE_FILE).read_text())
        assert (fields["host"], fields["pid"]) == (os.uname().nodename, os.getpid())
        assert held.check() == {"lease": fields["token"]}
    assert not list(tmp_path.iterdir())


def test_a_living_holder_on_this_machine_is_named(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    write(tmp_path, pid=child.pid, started=process_start(child.pid))
    before = (tmp_path / LEASE_FILE).read_bytes()
    assert f"run_dir: {tmp_path} is in use by {os.uname().nodename}:{child.pid}; wait for that run" in refusal(tmp_path)
    assert (tmp_path / LEASE_FILE).read_bytes() == before


@pytest.mark.parametrize("state", ["zombie", "gone", "pid of another"])
def test_a_dead_holder_on_this_machine_is_replaced_at_once(
    state: str, tmp_path: Path, child: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    started = process_start(child.pid)
    if state == "pid of another":
        started = "1"
    else:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        if state == "gone":
            child.wait()
    write(tmp_path, pid=child.pid, started=started)
    begin = time.monotonic()
    with caplog.at_level("INFO", "spade_t5"), lease(tmp_path) as held:
        assert time.monotonic() - begin < 5
        assert held.check()["lease"] == json.loads((tmp_path / LEASE_FILE).read_text())["token"]
    documented(caplog.text)
    assert f"took over the lease of {os.uname().nodename}:{child.pid}, which is gone" in caplog.text


@contextmanager
def renewing(folder: Path, **fields: Any) -> Iterator[None]:
    """A lease file that gives signs of life."""
    write(folder, **fields)
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(0.1):
            write(folder, **fields, renewed=time.time())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_a_holder_elsewhere_that_renews_is_named(tmp_path: Path) -> None:
    with renewing(tmp_path, host="elsewhere", pid=77):
        assert "is in use by elsewhere:77" in refusal(tmp_path)


@pytest.fixture
def hidden(child: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """A living process that cannot be looked at, as where /proc hides those of other users."""
    fields = {"pid": child.pid, "started": process_start(child.pid)}
    place = f"/proc/{child.pid}"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield fields
    subprocess.run(["umount", place], check=True)


def test_a_hidden_holder_is_watched(hidden: dict[str, Any], tmp_path: Path) -> None:
    assert process_start(hidden["pid"]) is None
    with renewing(tmp_path, **hidden):
        assert f"is in use by {os.uname().nodename}:{hidden['pid']}" in refusal(tmp_path)
    with lease(tmp_path, time_to_live_seconds=0.5) as held:  # it gives no sign of life
        held.check()


@pytest.mark.parametrize("content", ["elsewhere", "other pid namespace", "", "{", "[]", '{"host": 3}'])
def test_a_holder_elsewhere_or_unknown_is_replaced_after_its_time(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if content == "elsewhere":
        write(tmp_path, host="elsewhere")
    elif content == "other pid namespace":
        write(tmp_path, machine="boot/pid:[7]")  # this very process by number, and yet not it
    else:
        (tmp_path / LEASE_FILE).write_text(content)
    begin = time.monotonic()
    with caplog.at_level("INFO", "spade_t5"), lease(tmp_path, time_to_live_seconds=1.0) as held:
        assert time.monotonic() - begin > 1
        held.check()
    documented(caplog.messages[0])


def test_a_lease_that_is_given_back_while_it_is_watched_is_taken(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere")
    threading.Timer(0.3, (tmp_path / LEASE_FILE).unlink).start()
    with lease(tmp_path) as held:  # far from its time to live
        held.check()


def test_the_holder_gives_signs_of_life_in_place(tmp_path: Path) -> None:
    with lease(tmp_path, time_to_live_seconds=1.0):
        file = (tmp_path / LEASE_FILE).open("rb")
        first = os.fstat(file.fileno()).st_ino, file.read()
        until = time.monotonic() + 10
        while (again := (tmp_path / LEASE_FILE).read_bytes()) == first[1]:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert (tmp_path / LEASE_FILE).stat().st_ino == first[0]  # a full disk does not matter
        assert Holder.parse(again) is not None
        file.close()


def test_a_lease_is_whole_whenever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time of fewer digits than the one before leaves nothing of it behind."""
    file = tmp_path / LEASE_FILE
    sizes = set()
    with lease(tmp_path, time_to_live_seconds=0.1) as held:
        for seconds in (1234567890.125, 9.5, 1234567890.123456):
            monkeypatch.setattr(time, "time", lambda seconds=seconds: seconds)
            until = time.monotonic() + 10
            while (holder := Holder.parse(content := file.read_bytes())) is None or holder.renewed != seconds:
                assert time.monotonic() < until
                time.sleep(0.01)
            sizes.add(len(content))
        assert len(sizes) == 1
        held.check()


def test_a_lease_that_is_read_in_the_middle_of_a_write_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / LEASE_FILE
    with lease(tmp_path) as held:
        content = file.read_bytes()
        file.write_bytes(content[:40])
        timer = threading.Timer(0.02, file.write_bytes, [content])
        timer.start()
        held.check()
        timer.join()


def test_a_lease_on_a_disk_that_fails_is_given_up_silently(tmp_path: Path) -> None:
    with disks.small_disk(tmp_path / "disk", "64k") as disk:
        held = Lease(disk, on_loss=lambda: None)
        held.take()
        disks.remount(disk, "ro")
        held.release()
        assert (disk / LEASE_FILE).exists()


@pytest.mark.parametrize("loss", ["taken over", "gone", "folder gone"])
def test_a_loss_is_noticed_by_itself_and_before_anything_is_published(loss: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    is_lost = threading.Event()
    with lease(folder, on_loss=is_lost.set, time_to_live_seconds=1.0) as held:
        if loss == "taken over":
            os.replace(_foreign(tmp_path), folder / LEASE_FILE)
        elif loss == "gone":
            (folder / LEASE_FILE).unlink()
        else:
            folder.rename(tmp_path / "moved")
        with pytest.raises(RunAbortedError) as caught:
            held.check()
        documented(str(caught.value))
        assert is_lost.wait(10)
    if loss == "taken over":
        assert "elsewhere:77 has taken over" in str(caught.value)
        assert json.loads((folder / LEASE_FILE).read_text())["host"] == "elsewhere"  # not given back by the loser


def _foreign(folder: Path) -> Path:
    write(folder, host="elsewhere", pid=77)
    return folder / LEASE_FILE


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits a minute at most."""
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def try_to_take(folder: str) -> str:
    """A rank that takes the lease and keeps it until the others were refused: how it ended."""
    place = Path(folder)
    taken = Lease(place, on_loss=lambda: None)
    (place / f"ready-{os.getpid()}").touch()
    wait_until(lambda: (place / "go").exists())
    try:
        taken.take()
        wait_until(lambda: len(list(place.glob("refused-*"))) == 3)
        taken.check()
    except (ConfigError, RunAbortedError) as error:
        (place / f"refused-{os.getpid()}").touch()
        return str(error)
    taken.release()
    return "had it"


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_four_that_start_together_one_has_it(is_stale: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if is_stale:
        write(folder, started="1")

    def start_together() -> None:
        wait_until(lambda: len(list(folder.glob("ready-*"))) == 4)
        (folder / "go").touch()

    thread = threading.Thread(target=start_together)
    thread.start()
    outcomes = call_on_ranks(try_to_take, {"folder": str(folder)}, num_ranks=4, log_dir=tmp_path / "logs")
    thread.join()
    assert outcomes.count("had it") == 1, outcomes
    others = [outcome for outcome in outcomes if outcome != "had it"]
    assert all(f"run_dir: {folder} is in use by {os.uname().nodename}:" in outcome for outcome in others)
    assert not (folder / LEASE_FILE).exists()

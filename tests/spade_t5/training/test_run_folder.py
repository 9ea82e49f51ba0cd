"""Where a run goes on, what is checked before it begins, and what is written when."""

import ctypes
import logging
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from spade_t5.checkpoint import save_checkpoint
from spade_t5.config import read_yaml
from spade_t5.errors import ConfigError, DataError, RunAbortedError, StopRequestedError
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.testing import call_on_ranks, disks, documented, launch_ranks
from spade_t5.training.backend import SingleProcess
from spade_t5.training.config import TrainingConfig
from spade_t5.training.lease import LEASE_FILE
from spade_t5.training.plots import draw_plots
from spade_t5.training.provenance import check_provenance, git_revision, provenance
from spade_t5.training.rank_log import LogFile
from spade_t5.training.run_folder import Resume, RunFolder, find_resume_point, open_run_folder
from spade_t5.training.shared_folder import check_shared

CONFIG: dict[str, Any] = {
    "run_dir": "a",
    "model": {"preset": "tiny"},
    "training": {"seed": 0, "steps": 3, "clip_norm": 1.0, "schedule": {"name": "constant"}},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    backend = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    facts = {"config": CONFIG, "provenance": provenance()}
    for step in (1, 2):
        save_checkpoint(tmp_path / "run" / "checkpoints", backend, step=step, facts=facts, keep=9)
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def begin(run_dir: Path, config: dict[str, Any] = CONFIG, resume: Resume = Resume()) -> None:  # noqa: B008
    with open_run_folder(run_dir, resume) as folder:
        folder.check_settings(config, PretrainConfig, num_steps=10)
        folder.begin(config)


def refused(run_dir: Path, resume: Resume = Resume(), config: dict[str, Any] = CONFIG) -> str:  # noqa: B008
    """What a run is refused with; the folder stays as it was."""
    place = next(folder for folder in run_dir.parents if folder.exists())
    before = contents(place)
    with pytest.raises((ConfigError, DataError)) as caught:
        begin(run_dir, config, resume)
    assert contents(place) == before
    message = str(caught.value)
    assert "\n" not in message
    documented(message)
    return message


def test_auto_starts_anew_in_a_new_folder_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "spade_t5"):
        assert find_resume_point(tmp_path, "auto") is None
    assert f"no checkpoint in {tmp_path / 'checkpoints'}: starting at step 0" in caplog.messages


def test_a_path_may_be_a_checkpoint_or_another_run(run_dir: Path, tmp_path: Path) -> None:
    first = run_dir / "checkpoints" / "step-00000001"
    assert find_resume_point(tmp_path / "new", str(first)) == first
    assert find_resume_point(tmp_path / "new", str(run_dir)) == run_dir / "checkpoints" / "step-00000002"
    assert find_resume_point(tmp_path / "new", f"{run_dir}/../run/checkpoints/../") == Path(
        f"{run_dir}/../run/checkpoints/../checkpoints/step-00000002"
    )


@pytest.mark.parametrize("point", ["nowhere", "../../etc", "/", "a\nb", "~", "step-00000002", ""])
def test_a_resume_point_that_is_none(point: str, run_dir: Path) -> None:
    message = refused(run_dir, Resume(point=point))
    assert "is no checkpoint and holds none; give auto, none, or the path of a checkpoint or run folder" in message


def test_a_checkpoint_without_settings(tmp_path: Path) -> None:
    backend = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    path = save_checkpoint(tmp_path / "library" / "checkpoints", backend, step=1, facts={}, keep=1)
    assert f"{path} does not say with which settings" in refused(tmp_path / "run", Resume(point=str(path)))


def test_a_checkpoint_that_lost_its_name_has_it_back_in_the_own_folder_alone(run_dir: Path, tmp_path: Path) -> None:
    """Another run may be going on, and just be putting a new one in its place."""
    newest = run_dir / "checkpoints" / "step-00000002"
    hidden = newest.rename(newest.with_name(".step-00000002.replaced"))
    assert find_resume_point(tmp_path / "new", str(run_dir)) == newest.with_name("step-00000001")
    assert hidden.exists()
    assert find_resume_point(run_dir, "auto") == newest


def test_none_never_overwrites_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "new", "none") is None
    for _ in range(2):
        assert "already holds checkpoints; use another run_dir, or --resume auto" in refused(
            run_dir, Resume(point="none")
        )
        for path in run_dir.glob("checkpoints/*/manifest.json"):  # a damaged one is one as well
            path.unlink()


def test_the_resolved_config_is_written(tmp_path: Path) -> None:
    begin(tmp_path / "deep" / "run")
    assert read_yaml(tmp_path / "deep" / "run" / "config.yaml") == CONFIG
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == {"config.yaml", "checkpoints", "logs"}


def test_a_refused_run_leaves_no_folder_and_no_parents(tmp_path: Path) -> None:
    def train(folder: RunFolder) -> None:
        assert (folder.path / LEASE_FILE).exists()
        raise DataError("no text")

    with pytest.raises(DataError, match="no text"), open_run_folder(tmp_path / "deep" / "run", Resume()) as folder:
        train(folder)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="no text"), open_run_folder(tmp_path / "mine", Resume()):
        raise DataError("no text")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # which was there before


def make_file(place: Path) -> str:
    (place / "run").write_text("")
    return "run is a file; choose another folder"


def make_link(place: Path) -> str:
    (place / "elsewhere").mkdir()
    (place / "run").symlink_to(place / "elsewhere")
    return f"run is a symbolic link to {place / 'elsewhere'}; give run_dir={place / 'elsewhere'}, so that"


def make_dangling_link(place: Path) -> str:
    (place / "run").symlink_to(place / "nowhere")
    return f"run is a symbolic link to {place / 'nowhere'}; give run_dir={place / 'nowhere'}, so that"


def make_file_above(place: Path) -> str:
    (place / "run").mkdir()
    (place / "run" / "checkpoints").write_text("")
    return "checkpoints is a file; choose another folder"


def make_linked_checkpoints(place: Path) -> str:
    (place / "elsewhere").mkdir()
    (place / "run").mkdir()
    (place / "run" / "checkpoints").symlink_to(place / "elsewhere")
    return f"checkpoints is a symbolic link to {place / 'elsewhere'}; move the checkpoints into the run folder"


@pytest.mark.parametrize("make", [make_file, make_link, make_dangling_link, make_file_above, make_linked_checkpoints])
def test_a_folder_that_is_none_of_its_own(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = make(tmp_path)
    assert message in refused(tmp_path / "run")


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be made (Not a directory); choose another folder" in refused(tmp_path / "file" / "run")
    assert "cannot be made (File name too long)" in refused(tmp_path / "deep" / ("x" * 300))
    assert "a\\x00b cannot be made (" in refused(tmp_path / "deep" / "a\0b")


@pytest.mark.parametrize("is_new", [False, True])
def test_a_read_only_disk(is_new: bool, disk: Path) -> None:
    if not is_new:
        (disk / "run").mkdir()
    disks.remount(disk, "ro")
    assert f"{'made' if is_new else 'written'} (Read-only file system); choose another folder" in refused(disk / "run")


def test_a_full_disk_at_the_start(disk: Path) -> None:
    (disk / "run").mkdir()
    ballast = os.open(disk / "ballast", os.O_CREAT | os.O_WRONLY)
    while os.statvfs(disk).f_bavail:
        os.write(ballast, bytes(4096))
    os.close(ballast)
    assert "cannot be written (No space left on device); choose another folder" in refused(disk / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    with disks.small_disk(tmp_path / "disk", "64k") as place:
        yield place


def test_two_runs_of_one_folder_in_one_process(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, Resume()) as folder:
        with pytest.raises(ConfigError, match=f"is in use by {os.uname().nodename}:{os.getpid()}"):
            begin(tmp_path)
        folder.check_lease()
        folder.begin(CONFIG)
    begin(tmp_path)  # it was given back


def test_newer_checkpoints_are_set_aside_and_unfinished_ones_removed_when_the_run_begins(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / ".step-00000003.tmp").mkdir()
    first = checkpoints / "step-00000001"
    with open_run_folder(run_dir, Resume(point=str(first))) as folder:
        folder.check_settings(CONFIG, PretrainConfig, num_steps=10)
        assert {path.name for path in checkpoints.iterdir()} == {
            "step-00000001",
            "step-00000002",
            ".step-00000003.tmp",
        }
        assert not folder.is_finished(2)
        folder.begin(CONFIG)
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000001", "step-00000002.abandoned"}
    with open_run_folder(run_dir, Resume()) as folder:
        assert folder.resume_from == first
        assert folder.is_finished(1)


def test_a_foreign_checkpoint_does_not_mix_with_own_ones(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = SingleProcess(nn.Linear(2, 2), TrainingConfig(steps=1, global_batch_rows=1, micro_batch_rows=1))
    facts: dict[str, Any] = {"config": CONFIG, "provenance": provenance()}
    foreign = save_checkpoint(tmp_path / "other" / "checkpoints", backend, step=9, facts=facts, keep=9)
    for point in (foreign, tmp_path / "other"):
        assert "already holds checkpoints; use another run_dir" in refused(run_dir, Resume(point=str(point)))
    # the command that begins a run there goes on with it when it is given again
    for point in (foreign, tmp_path / "other"):
        new = tmp_path / f"from-{point.name}"
        with open_run_folder(new, Resume(point=str(point))) as folder:
            assert folder.resume_from == foreign
            begun = folder.started_from
        own = save_checkpoint(new / "checkpoints", backend, step=10, facts={**facts, "started_from": begun}, keep=9)
        caplog.clear()
        with caplog.at_level("INFO", "spade_t5"), open_run_folder(new, Resume(point=str(point))) as folder:
            assert folder.resume_from == own
            assert folder.started_from == begun
        documented(caplog.text)
        assert f"was begun from {point}: going on from its own checkpoints" in caplog.text
        assert "already holds checkpoints" in refused(new, Resume(point=str(run_dir)))


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SPADE_T5_ATTEMPT"])
def test_ranks_that_are_started_again_go_on_from_what_their_first_attempt_has_saved(
    variable: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = shutil.copytree(run_dir, tmp_path / "other") / "checkpoints" / "step-00000001"
    monkeypatch.setenv(variable, "0")
    for point in (str(foreign), "none"):
        assert "already holds checkpoints" in refused(run_dir, Resume(point=point))
    monkeypatch.setenv(variable, "1")
    newest = run_dir / "checkpoints" / "step-00000002"
    for restarted in (str(foreign), "none", str(run_dir / "checkpoints" / "step-00000001")):
        assert find_resume_point(run_dir, restarted) == newest
    # nothing was saved yet
    assert find_resume_point(tmp_path / "new", str(foreign)) == foreign
    assert find_resume_point(tmp_path / "new", "none") is None


@pytest.mark.parametrize("damage", ["state.json", "rank-00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_that_is_asked_for_is_refused_and_otherwise_the_one_before_is_taken(
    damage: str, run_dir: Path
) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    os.truncate(checkpoint / damage, 5)
    with pytest.raises(DataError, match=damage.replace(".", r"\.")):
        find_resume_point(run_dir, str(checkpoint))
    assert find_resume_point(run_dir, "auto") == run_dir / "checkpoints" / "step-00000001"
    (run_dir / "checkpoints" / "step-00000001" / damage).unlink()
    before = contents(run_dir)
    with pytest.raises(DataError, match="none is good"):
        begin(run_dir)
    assert contents(run_dir) == before


def test_changes_are_announced_or_refused_before_anything_is_written(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = {**CONFIG, "run_dir": "b", "training": {**CONFIG["training"], "steps": 9}}
    with caplog.at_level(logging.INFO, "spade_t5"):
        begin(run_dir, longer)
    assert "training.steps: was 3 in the checkpoint, is 9 now" in caplog.messages
    assert "training.steps: was 3 in" in (run_dir / "logs" / "rank-00000.log").read_text()
    clipped = {**CONFIG, "training": {**CONFIG["training"], "clip_norm": 0.5}}
    assert "training.clip_norm: was 1.0 in the checkpoint, is 0.5 now; set it back, or add" in refused(
        run_dir, config=clipped
    )
    begin(run_dir, clipped, Resume(allow_changes=("training.clip_norm",)))
    assert read_yaml(run_dir / "config.yaml") == clipped
    seeded = {**CONFIG, "training": {**CONFIG["training"], "seed": 5}}
    assert "training.seed: was 0 in the checkpoint, is 5 now; a resumed run cannot change it" in refused(
        run_dir, config=seeded
    )
    assert "is no setting of this run" in refused(run_dir, Resume(allow_changes=("trainig.seed",)))
    assert "is no setting of this run" in refused(run_dir.parent / "new", Resume(allow_changes=("trainig.seed",)))
    without = {**CONFIG, "training": {key: value for key, value in CONFIG["training"].items() if key != "clip_norm"}}
    message = refused(run_dir, config=without)
    assert "training.clip_norm: was 1.0 in the checkpoint, is None now; set it back, or add --allow-change" in message
    begin(run_dir, without, Resume(allow_changes=("training.clip_norm",)))


def test_other_libraries_are_announced_or_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin(run_dir, CONFIG, Resume(strict_env=True))
    here = provenance()
    assert {"python", "torch", "deepspeed", "transformers", "triton", "git_revision"} <= here.keys()
    assert here["torch"] is not None
    monkeypatch.setattr("spade_t5.training.run_folder.provenance", lambda: {**here, "torch": "9.9"})
    message = refused(run_dir, Resume(strict_env=True))
    assert f"--strict-env: torch: {here['torch']} made the checkpoint, here is 9.9; install what" in message
    with caplog.at_level(logging.INFO, "spade_t5"):
        begin(run_dir)
    documented(caplog.text)
    for name in ("git_revision", "spade-t5"):
        monkeypatch.setattr("spade_t5.training.run_folder.provenance", lambda name=name: {**here, name: "another"})
        message = refused(run_dir, Resume(strict_env=True))
        assert f"--strict-env: {name}: {here[name]} made the checkpoint, here is another; install what" in message
    older = {name: version for name, version in here.items() if name != "spade-t5"}
    check_provenance(older, here, is_strict=True)  # of a version that did not say it
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git_revision"] is None


def test_the_revision_is_that_of_the_package_s_own_checkout(tmp_path: Path) -> None:
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    installed = tmp_path / "venv" / "package.py"
    installed.parent.mkdir()
    installed.touch()
    assert git_revision(installed) is None
    subprocess.run(["git", "add", installed], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert git_revision(installed) == head.stdout.strip()


def test_the_log_of_a_rank_has_one_line_for_each_message_and_the_traceback_of_a_fault(tmp_path: Path) -> None:
    def train(folder: RunFolder) -> None:
        logging.getLogger("spade_t5").warning("before\n\x1b[31mred %s", "x" * 10_000)
        folder.begin(CONFIG)
        logging.getLogger("spade_t5.deeper").info("after")
        raise ZeroDivisionError("by\nnothing")

    logging.getLogger("spade_t5").setLevel(logging.INFO)  # as the command does
    with pytest.raises(ZeroDivisionError), open_run_folder(tmp_path, Resume()) as folder:
        train(folder)
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    lines = text.splitlines()
    assert all(line.isprintable() and len(line.encode()) <= 4096 for line in lines)
    assert any(r"WARNING before\n\x1b[31mred xxx" in line for line in lines)
    assert any(line.endswith("INFO after") for line in lines)
    assert "Traceback (most recent call last):" in text
    assert any(line.startswith("ZeroDivisionError: by") for line in lines)
    logging.getLogger("spade_t5").warning("later")
    assert (tmp_path / "logs" / "rank-00000.log").read_text() == text


def test_a_fault_before_the_run_begins_is_in_the_log_and_a_refusal_is_not(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run_folder(tmp_path / "run", Resume()):
        raise ZeroDivisionError
    assert "Traceback" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    for expected in (RunAbortedError("the lease was lost"), StopRequestedError("stopped")):
        with pytest.raises(type(expected)), open_run_folder(tmp_path / "new", Resume()):
            raise expected
        assert not (tmp_path / "new").exists()

    def abort(folder: RunFolder) -> None:
        folder.begin(CONFIG)
        raise RunAbortedError("the numbers are gone")

    with pytest.raises(RunAbortedError), open_run_folder(tmp_path / "aborted", Resume()) as folder:
        abort(folder)
    text = (tmp_path / "aborted" / "logs" / "rank-00000.log").read_text()
    assert "ERROR the numbers are gone" in text
    assert "Traceback" not in text


def test_a_fault_is_not_hidden_by_a_folder_that_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def lose() -> None:
        shutil.rmtree(run)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), open_run_folder(run, Resume()):
        lose()
    assert not run.exists()


def test_a_folder_that_cannot_be_written_when_the_run_begins(disk: Path) -> None:
    def attempt(name: str, act: Callable[[RunFolder], None]) -> None:
        with pytest.raises(ConfigError) as caught:
            act_on_failing_disk(name, act)
        line = f"run_dir: {disk / name} cannot be written (Read-only file system); choose another folder"
        assert str(caught.value) == line
        documented(line)

    def act_on_failing_disk(name: str, act: Callable[[RunFolder], None]) -> None:
        try:
            with open_run_folder(disk / name, Resume()) as folder:
                disks.remount(disk, "ro")
                act(folder)
        finally:
            disks.remount(disk, "rw")

    attempt("begin", lambda folder: folder.begin(CONFIG))
    attempt("write", lambda folder: folder.write(lambda: (folder.path / "a").touch()))


def crash(folder: str) -> None:
    """What a rank does first: it opens its run folder and reads where there is nothing."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open_run_folder(Path(folder), Resume()) as opened:
        opened.begin({})
        ctypes.string_at(0)


def test_the_stacks_of_a_crash_are_in_the_log(tmp_path: Path) -> None:
    run = tmp_path / "run"
    hook = {"hook": crash, "hook_arguments": {"folder": str(run)}}
    with launch_ranks(["verify", "nothing"], num_ranks=1, log_dir=tmp_path / "logs", **hook) as group:
        assert group.wait() == [-signal.SIGSEGV]
    text = (run / "logs" / "rank-00000.log").read_text()
    assert "Fatal Python error: Segmentation fault" in text
    assert "in string_at" in text
    begin(run, {})  # the lease of the dead is taken over


def open_on_rank(folders: list[str], config: list[dict[str, Any]]) -> dict[str, Any]:
    """A rank that opens its folder and checks its settings: what came of it."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    try:
        with open_run_folder(Path(folders[rank]), Resume()) as folder:
            folder.check_settings(config[rank], PretrainConfig, num_steps=10)
            folder.begin(config[rank])
            logging.getLogger("spade_t5").warning("rank %d was here", rank)
    except ConfigError as error:
        return {"error": str(error)}
    finally:
        dist.destroy_process_group()
    return {}


def test_ranks_share_a_folder_a_lease_and_settings(tmp_path: Path) -> None:
    def outcomes(folders: list[Path], configs: list[dict[str, Any]]) -> set[str]:
        arguments = {"folders": [str(folder) for folder in folders], "config": configs}
        found = call_on_ranks(open_on_rank, arguments, num_ranks=2, log_dir=tmp_path / "logs")
        return {outcome.get("error", "") for outcome in found}

    run = tmp_path / "run"
    assert outcomes([run, run], [CONFIG, CONFIG]) == {""}
    for rank in (0, 1):
        assert f"WARNING rank {rank} was here" in (run / "logs" / f"rank-{rank:05d}.log").read_text()
    assert {path.name for path in run.iterdir()} == {"config.yaml", "checkpoints", "logs"}
    # other settings, other folders, a lease that is held: the same line on every rank
    (message,) = outcomes([tmp_path / "new"] * 2, [CONFIG, {**CONFIG, "model": {"preset": "mini"}}])
    assert message == "model.preset: 'tiny' on rank 0 and 'mini' on rank 1; start every rank with the same settings"
    documented(message)
    counted = {**CONFIG, "training": {**CONFIG["training"], "clip_norm": 1}}
    (message,) = outcomes([tmp_path / "new"] * 2, [CONFIG, counted])
    assert message.startswith("training.clip_norm: 1.0 on rank 0 and 1 on rank 1; start")
    (message,) = outcomes([tmp_path / "new"] * 2, [CONFIG, {**CONFIG, "evaluation": {}}])
    assert message == "config: not the same on every rank; start every rank with the same settings"
    documented(message)
    (message,) = outcomes([tmp_path / "new", tmp_path / "newer"], [CONFIG, CONFIG])
    assert message.startswith(f"run_dir: '{tmp_path / 'new'}' on rank 0 and '{tmp_path / 'newer'}' on rank 1; start")
    with open_run_folder(run, Resume()):
        (message,) = outcomes([run, run], [CONFIG, CONFIG])
    assert f"is in use by {os.uname().nodename}:{os.getpid()}" in message
    assert {path.name for path in tmp_path.iterdir()} == {"run", "logs"}


def look_on_rank(folders: list[str]) -> str:
    """A rank whose folder may be another disk than that of the same name elsewhere: what the check says."""
    dist.init_process_group("gloo")
    try:
        check_shared(Path(folders[int(os.environ["RANK"])]), patience_seconds=0.5)
    except ConfigError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_ranks_that_see_different_disks_are_refused(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    host = os.uname().nodename
    here.mkdir()

    def messages(other: Path) -> set[str]:
        arguments = {"folders": [str(here), str(other)]}
        return set(call_on_ranks(look_on_rank, arguments, num_ranks=2, log_dir=tmp_path / "logs"))

    assert messages(here) == {""}
    (message,) = messages(there)  # does not exist on the other node
    assert message.startswith(f"run_dir: rank 1 on {host} cannot write into {there} (No such file or directory); give")
    documented(message)
    there.mkdir()
    (message,) = messages(there)
    assert f"does not see in {here} what rank 1 on {host} wrote there" in message
    documented(message)
    assert not [*here.iterdir(), *there.iterdir()]


def test_a_log_on_a_full_disk_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    file = LogFile(Path("/dev/full"))
    file.handle(logging.makeLogRecord({"msg": "a line", "levelno": logging.INFO}))
    file.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": logging.INFO}))
    file.close()
    err = capfd.readouterr().err
    assert "No space left" not in err
    assert err.count("--- Logging error ---") == 1  # a fault of the program is not swallowed


def test_curves_without_a_place_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": 1, "loss": 2.0}\n')
    (tmp_path / "plots").write_text("")
    assert draw_plots(tmp_path) == []
    documented(caplog.text)


def test_nobody_else_may_change_what_a_run_goes_on_from(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with open_run_folder(tmp_path / "run", Resume()) as folder:
            folder.begin(CONFIG)
            paths = [folder.path, *(folder.path / name for name in ("checkpoints", "logs", "config.yaml", LEASE_FILE))]
            assert [path for path in paths if path.stat().st_mode & 0o022] == []
    finally:
        os.umask(umask)

"""`spade-t5 launch slurm` on a real cluster of two nodes: submitted, put back, stopped; and the job scripts that it writes."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from spade_t5.launch.cli import main
from spade_t5.launch.environment import FORWARDED
from spade_t5.testing import documented, guide, launch_ranks, run_command
from spade_t5.testing.endings import ranks_that_end
from spade_t5.testing.runs import assert_exact, attempts, write_recipe
from spade_t5.testing.slurm import NODES, SlurmCluster, slurm_cluster, why_no_slurm

STEPS = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    with slurm_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    return write_recipe(path, [store], steps=STEPS, save_every_steps=3, loader_workers=0, keep_checkpoints=2)


def submitted(
    cluster: SlurmCluster,
    recipe: Path,
    tmp_path: Path,
    *words: str,
    num_nodes: int = 2,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] = {},
) -> int:
    """The number of a job that the command of the guide submits, on nodes without GPUs; its run folder is run, its output job.out."""
    launch = guide.command(
        "multinode.md",
        "spade-t5 launch slurm",
        {
            "3:4": [str(num_nodes)],
            "8": [],
            "--nproc-per-node": ["--nproc-per-node", "1", "--grace", "20"],
            "--gpus-per-node": [],
            "--": [*options, "--sbatch", f"output={tmp_path}/job.out", "--"],
            "c4-base": [str(recipe), *words],
            "run_dir=/shared/runs/base": [f"run_dir={tmp_path}/run"],
            "data.store=/shared/stores/c4": [],  # the recipe mixes several
        },
    )
    done = run_command([sys.executable, "-m", "spade_t5.launch", *launch], env={**cluster.environment, **env})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def disturb(cluster: SlurmCluster, job: int, start: str) -> None:
    """Runs the command of the guide that begins so."""
    line = next(line for line in guide.commands("multinode.md") if line.startswith(start))
    cluster.run(*(word.replace("$JOB", str(job)) for word in shlex.split(line)))


def wait_for_steps(cluster: SlurmCluster, job: int, run_dir: Path, count: int) -> None:
    """Until so many steps were made, redone ones counted as well."""
    out = run_dir.parent / "job.out"
    deadline = time.monotonic() + 240
    while len(attempts(run_dir)) < count:
        assert time.monotonic() < deadline, out.read_text() if out.exists() else cluster.logs()
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), out.read_text()
        time.sleep(0.05)


def test_a_job_trains_on_both_nodes_and_goes_on_exactly_after_a_requeue_and_after_usr1(
    cluster: SlurmCluster, recipe: Path, tmp_path: Path
) -> None:
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    with launch_ranks(
        ["pretrain", str(recipe), f"run_dir={undisturbed}"], num_ranks=2, log_dir=tmp_path / "logs"
    ) as group:
        assert group.wait() == [0, 0], group.errors()
    job = submitted(cluster, recipe, tmp_path)
    wait_for_steps(cluster, job, run_dir, 4)
    disturb(cluster, job, "scontrol requeue")
    wait_for_steps(cluster, job, run_dir, len(attempts(run_dir)) + 4)
    disturb(cluster, job, "scancel --batch --signal=USR1")  # as SLURM does when the time limit is near
    assert cluster.wait_for_end(job) == ("COMPLETED", "0:0"), (tmp_path / "job.out").read_text()
    said = (tmp_path / "job.out").read_text()
    assert cluster.job(job)["Restarts"] == "2"
    assert said.count("resumed from") == 2
    (line,) = [line for line in said.splitlines() if "is put back" in line]
    documented(line)
    assert_exact(run_dir, undisturbed)
    hosts = {path.name.split("-")[3] for path in run_dir.glob("logs/launch-*")}
    assert hosts == {NODES[0]}


def test_the_exit_codes_of_jobs_are_those_of_their_ranks(cluster: SlurmCluster, recipe: Path, tmp_path: Path) -> None:
    jobs = {}
    for code in (1, 2, 75):
        (folder := tmp_path / str(code)).mkdir()
        words = ("data.mixture=[{store: /gone, rate: 1.0}]",) if code == 2 else ()
        env = {} if code == 2 else ranks_that_end(folder, code)
        jobs[code] = submitted(
            cluster, recipe, folder, *words, num_nodes=1, options=("--max-restarts", "0", "--no-requeue"), env=env
        )
    for code, job in jobs.items():
        said = tmp_path / str(code) / "job.out"
        assert cluster.wait_for_end(job) == ("FAILED", f"{code}:0"), said.read_text()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "options", "number", "ending"),
    [
        (("training.deepspeed=null",), (), None, ("FAILED", "2:0")),
        (("training.steps=1000",), (), "TERM", ("FAILED", "75:0")),
        (("training.steps=1000",), ("--no-requeue",), "USR1", ("FAILED", "75:0")),
        (("data.mixture=[{store: /gone, rate: 1.0}]",), ("--max-restarts", "0"), None, ("FAILED", "2:0")),
    ],
)
def test_the_exit_code_of_the_job_is_the_runs(
    cluster: SlurmCluster,
    recipe: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    options: tuple[str, ...],
    number: str | None,
    ending: tuple[str, str],
) -> None:
    run_dir = tmp_path / "run"
    job = submitted(cluster, recipe, tmp_path, *words, options=options)
    if number is not None:
        wait_for_steps(cluster, job, run_dir, 2)
        cluster.run("scancel", "--batch", f"--signal={number}", str(job))
    assert cluster.wait_for_end(job) == ending, (tmp_path / "job.out").read_text()


@pytest.mark.faults
def test_a_rank_that_always_dies_ends_the_job_with_1(cluster: SlurmCluster, recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ("training.steps=100000", "training.save_every_steps=100000")
    job = submitted(cluster, recipe, tmp_path, *words, options=("--max-restarts", "1"))
    for count in (1, 2):
        wait_for_steps(cluster, job, run_dir, 2 * count)
        for process in psutil.process_iter(["cmdline"]):
            words_of = process.info["cmdline"] or []
            if str(recipe) in words_of and any(Path(word).name == "rank.py" for word in words_of[:4]):
                process.kill()
        time.sleep(3)
    assert cluster.wait_for_end(job) == ("FAILED", "1:0"), (tmp_path / "job.out").read_text()


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command in a shell of no job, in a folder of its own."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> int:
        return main(["launch", "slurm", *words])

    return call


def lines_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_job_script_asks_for_whole_nodes_and_names_variables_alone(
    outside: Callable[..., int], recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(FORWARDED):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    command = ["--", "pretrain", str(recipe), "run_dir=runs/with space"]
    options = ["--nnodes", "2:4", "--nproc-per-node", "8", "--time", "24:00:00", "--gpus-per-node", "8", "--dry-run"]
    assert outside(*options, "--env", "WANDB_API_KEY", "--env", "LEVEL=3", "--sbatch", "partition=gpu", *command) == 0
    script = capfd.readouterr().out
    assert "a-very-secret-value" not in script
    assert lines_of(script) == [
        "--nodes=2-4",
        "--ntasks-per-node=1",
        "--signal=B:USR1@180",
        "--requeue",
        "--no-kill",
        "--export=NCCL_DEBUG,WANDB_API_KEY",
        "--time=24:00:00",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--open-mode=append",
        "--partition=gpu",
    ]
    last = shlex.split(script.splitlines()[-1])
    assert last[:6] == ["exec", sys.executable, "-m", "spade_t5.launch", "launch", "slurm"]
    assert last[last.index("--") :] == command
    assert "LEVEL=3" in last
    assert (
        outside("--nnodes", "2", "--nproc-per-node", "8", "--dry-run", "--no-requeue", "--sbatch", "mem=10G", *command)
        == 0
    )
    shared = lines_of(capfd.readouterr().out)
    assert "--no-requeue" in shared
    assert "--exclusive" not in shared


@pytest.mark.parametrize(
    "words",
    [
        ["--nproc-per-node", "2"],
        ["--nnodes", "2"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--sbatch", "Partition=gpu"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--sbatch", "export=ALL"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--sbatch", "comment=it's"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--time", "1\n#SBATCH --wrap"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--env", "HF_TOKEN=abcdefghijk"],
        ["--nnodes", "2", "--nproc-per-node", "2", "--env", "SOURCE=https://ann:pass@host/"],
    ],
)
def test_what_cannot_be_submitted_is_one_message(
    outside: Callable[..., int], recipe: Path, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert outside(*words, "--dry-run", "--", "pretrain", str(recipe), "run_dir=run") == 2
    message = capfd.readouterr().err
    documented(message)
    assert message.count("\n") == 1


def test_without_slurm_the_command_says_so(
    outside: Callable[..., int], recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    command = ["--nnodes", "2", "--nproc-per-node", "2", "--", "pretrain", str(recipe), "run_dir=run"]
    assert outside(*command) == 2
    documented(capfd.readouterr().err)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert outside("--time", "1:00:00", *command) == 2
    documented(capfd.readouterr().err)

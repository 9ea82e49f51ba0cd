"""Launches on several machines: the list, the remote shell, the environment, and two nodes on the loopback network."""

import json
import os
import sys
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError
from spade_t5.launch import coordinator, environment
from spade_t5.launch.cli import main
from spade_t5.launch.environment import forwarded, machine_variables
from spade_t5.launch.hostfile import read_hostfile
from spade_t5.launch.options import node_range
from spade_t5.launch.remote_shell import is_here, remote_words, same_place_words
from spade_t5.testing import documented, run_command
from spade_t5.testing.endings import ranks_that_end
from spade_t5.testing.runs import write_recipe

SPADE_T5 = [sys.executable, "-m", "spade_t5.launch"]


def test_hosts_and_their_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\nnode1 slots=8\n\nann@node2.example.org slots=4  # half of it is broken\n")
    assert read_hostfile(path, None) == [("node1", 8), ("ann@node2.example.org", 4)]
    assert read_hostfile(path, 2) == [("node1", 2), ("ann@node2.example.org", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node1", "has no slots=N"),
        ("node1 slots=0", "is 'node1 slots=0'"),
        ("node1 slots=two", "is 'node1 slots=two'"),
        ("node1 slots=2 max_slots=4", "is 'node1 slots=2 max_slots=4'"),
        ("-oProxyCommand=harm slots=2", "is '-oProxyCommand=harm slots=2'"),
        ("node1;harm slots=2", "is 'node1;harm slots=2'"),
        ("node1 slots=2\nnode1 slots=2", "has node1 again"),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_hostfile(path, None)
    documented(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        read_hostfile(tmp_path / "absent", None)
    documented(str(caught.value))


def test_least_and_largest_numbers_of_nodes() -> None:
    assert node_range("2:4") == (2, 4)
    assert node_range("3") == (3, 3)
    for text in ("0", "4:2", "a", "1:b", ""):
        with pytest.raises(Exception, match=text or "is not"):
            node_range(text)


def test_a_remote_shell_gets_a_line_or_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sh", "-c", 'echo "$0"', "it's"]
    assert remote_words("ssh -q", "node1", words) == ["ssh", "-q", "node1", """sh -c 'echo "$0"' 'it'"'"'s'"""]
    assert remote_words("srun -w {host} --", "node1", words) == ["srun", "-w", "node1", "--", *words]
    monkeypatch.setenv("PYTHONPATH", "/here")
    assert same_place_words(["launch"])[3:] == [
        os.getcwd(),
        "env",
        *(f"{name}={os.environ[name]}" for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if os.environ.get(name)),
        sys.executable,
        "-m",
        "spade_t5.launch",
        "launch",
    ]


def test_names_of_this_machine() -> None:
    assert is_here("localhost")
    assert is_here("127.0.0.2")
    assert not is_here("198.51.100.7")
    assert not is_here("no-such-host.invalid")


def test_variables_go_along_if_they_matter_or_are_named_but_secrets_only_if_named() -> None:
    here = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "key",
        "WANDB_MODE": "offline",
        "TRITON_CACHE_DIR": "/home/ann/.triton",
        "EDITOR": "ed",
    }
    assert forwarded([], here) == {"NCCL_DEBUG": "INFO", "WANDB_MODE": "offline"}
    assert forwarded(["HF_TOKEN", "A=b=c", "TRITON_CACHE_DIR"], here) == {
        "NCCL_DEBUG": "INFO",
        "WANDB_MODE": "offline",
        "HF_TOKEN": "hf_secret",
        "A": "b=c",
        "TRITON_CACHE_DIR": "/home/ann/.triton",
    }
    for word in ("EDITORS", "A B=c", "=c"):
        with pytest.raises(ConfigError) as caught:
            forwarded([word], here)
        documented(str(caught.value))


def test_a_machine_finds_its_interface_and_has_caches_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.tempfile, "tempdir", str(tmp_path))
    variables = machine_variables("127.0.0.1", {"HF_DATASETS_CACHE": "/mine"})
    assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "lo"
    folder = tmp_path / f"spade-t5-cache-{os.getuid()}"
    assert variables["TRITON_CACHE_DIR"] == str(folder / "triton")
    assert "HF_DATASETS_CACHE" not in variables
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # anybody may have put compiled code there
    other = Path(machine_variables("198.51.100.7", {})["TRITON_CACHE_DIR"]).parent
    assert other.parent == tmp_path
    assert other != folder
    assert "GLOO_SOCKET_IFNAME" not in machine_variables("198.51.100.7", {})


@pytest.mark.parametrize(
    ("shell", "first"), [("false", "ended with code 1"), ("/no/such/shell", "cannot be started (No such file")]
)
def test_a_host_that_cannot_be_reached_ends_the_launch_and_names_it(
    shell: str,
    first: str,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(coordinator, "START_PAUSE_SECONDS", 0.1)
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=2)
    hosts = tmp_path / "hosts"
    hosts.write_text("198.51.100.7 slots=1\n")
    words = ["launch", "hostfile", "--hostfile", str(hosts), "--address", "127.0.0.1"]
    run_words = ["--", "pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]
    assert main([*words, "--remote-shell", shell, *run_words]) == 1
    said = capfd.readouterr().err.splitlines()
    assert any(first in line for line in said), said
    assert any("198.51.100.7: the command that starts a node there failed 3 times" in line for line in said), said
    assert not any("starting again" in line for line in said), said
    for line in said:
        documented(line)


def test_what_is_wrong_is_said_before_anything_starts(
    tmp_path: Path, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=2)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n")
    command = ["--", "pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]
    for words in (
        ["--nnodes", "2"],
        ["--lost-after", "0"],
        ["--wait-for-nodes", "nan"],
        ["--nproc-per-node", "0"],
        ["--address", "198.51.100.7"],
    ):
        assert main(["launch", "hostfile", "--hostfile", str(hosts), *words, *command]) == 2
        documented(capfd.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_secret_is_in_no_dry_run(tmp_path: Path, store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=2)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\nnode2 slots=4\n")
    words = ["launch", "hostfile", "--hostfile", str(hosts), "--address", "127.0.0.1", "--env", "MY_TOKEN=unspeakable"]
    assert main([*words, "--dry-run", "--", "pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]) == 0
    out = capfd.readouterr().out
    assert "unspeakable" not in out
    assert "MY_TOKEN='***'" in out
    assert "# node2: ranks 2 to 5" in out
    assert "ServerAliveInterval=10" in out


def test_two_nodes_on_one_machine_train_together(tmp_path: Path, store: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=3)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.2 slots=1\n")
    run_dir = tmp_path / "run"
    command = [*SPADE_T5, "launch", "hostfile", "--hostfile", str(hosts)]
    done = run_command([*command, "--", "pretrain", str(recipe), f"run_dir={run_dir}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run_dir}\n"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3]
    (logs,) = (run_dir / "logs").glob("launch-*")
    assert {path.name for path in logs.glob("rank-*.err")} == {"rank-00000.err", "rank-00001.err"}


@pytest.mark.parametrize("code", [1, 2, pytest.param(75, marks=pytest.mark.faults)])
def test_the_exit_code_is_that_of_the_ranks_on_both_nodes(
    code: int, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=3, loader_workers=0)
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.2 slots=1\n")
    words = ["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]
    if code == 2:
        words.append("training.deepspeed=null")
    else:
        monkeypatch.setenv("PYTHONPATH", ranks_that_end(tmp_path, code)["PYTHONPATH"])
    assert main(["launch", "hostfile", "--hostfile", str(hosts), "--max-restarts", "0", "--", *words]) == code
    said = capfd.readouterr().err.splitlines()[-1]
    assert {1: "giving up", 2: "training.deepspeed: null", 75: "stopped on request"}[code] in said

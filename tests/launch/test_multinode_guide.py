"""The guide for many machines: its commands are what the tests run, on two hosts in test_two_hosts.py, on SLURM in test_slurm.py, as pods in test_k8s.py.

Here those for a list of machines are shown by a dry run, that with accelerate's file among them, which is not run anywhere.
"""

import json
from pathlib import Path

import pytest
import yaml

from spade_t5.launch.cli import main
from spade_t5.testing.guide import DOCS, command, commands

PAGE = "multinode.md"
RUN_ELSEWHERE = ("spade-t5 launch slurm", "scancel", "scontrol", "spade-t5 launch k8s")
"""Beginnings of the commands that test_slurm.py and test_k8s.py run."""
ABOUT_A_CLUSTER = ("openssl", "kubectl")
"""Those of Kubernetes' own client: what they name is compared with the manifest."""


def test_every_command_of_the_guide_is_tried() -> None:
    known = (*RUN_ELSEWHERE, *ABOUT_A_CLUSTER, "spade-t5 launch hostfile")
    assert [line for line in commands(PAGE) if not line.startswith(known)] == []


def test_the_commands_for_a_list_of_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    text = (DOCS / PAGE).read_text()
    Path("hosts").write_text(text.split("```text\n")[1].split("```")[0])
    accelerate = {
        "distributed_type": "DEEPSPEED",
        "num_machines": 4,
        "num_processes": 32,
        "deepspeed_config": {"zero_stage": 2, "deepspeed_hostfile": "hosts"},
    }
    Path("accelerate.yaml").write_text(yaml.safe_dump(accelerate))
    Path("ds_config.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    lines = [line for line in commands(PAGE) if line.startswith("spade-t5 launch hostfile")]
    assert len(lines) == 3
    changes = {"--": ["--address", "127.0.0.1", "--dry-run", "--"]}
    doctor = command(PAGE, lines[1], changes | {"pretrain": ["doctor"]})
    for words in (*(command(PAGE, line, changes) for line in lines), doctor):
        assert main(words) == 0
        shown = capfd.readouterr().out
        assert shown.count("# gpu-0") == 4
        assert "ssh -o BatchMode=yes" in shown
        assert "a-very-secret-value" not in shown


def test_the_secret_of_the_guide_is_the_manifests(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(PAGE, "spade-t5 launch k8s")) == 0
    _, job = yaml.safe_load_all(capfd.readouterr().out)
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    (reference,) = [
        variable["valueFrom"]["secretKeyRef"]
        for variable in container["env"]
        if "secretKeyRef" in variable.get("valueFrom", {})
    ]
    line = next(line for line in commands(PAGE) if line.startswith("openssl"))
    assert line.endswith(f"create secret generic {reference['name']} --from-file={reference['key']}=/dev/stdin")
    (written,) = [line.partition(" > ")[2] for line in commands(PAGE) if line.startswith("spade-t5 launch k8s")]
    assert f"kubectl apply -f {written}" in commands(PAGE)

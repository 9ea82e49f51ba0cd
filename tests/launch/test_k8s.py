"""Manifests for Kubernetes: they are what the clients know, keep no secret, and their pods' own command trains."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow.training import ApiClient
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from spade_t5.launch import k8s
from spade_t5.launch.cli import main
from spade_t5.testing import documented, free_port, guide, launch_ranks
from spade_t5.testing.endings import ranks_that_end
from spade_t5.testing.runs import assert_exact, write_recipe

KUBERNETES = ("1.31", "1.37")
"""The oldest and the newest version whose schemas are asked."""
GUIDE = guide.command("multinode.md", "spade-t5 launch k8s")
OPTIONS = [
    *GUIDE[: GUIDE.index("--")],
    *(
        "--cpus-per-node",
        "96",
        "--memory-per-node",
        "1Ti",
        "--user",
        "1000:1000",
        "--secret",
        "WANDB_API_KEY=wandb:key",
    ),
    *("--env", "NCCL_DEBUG=WARN", "--env", "GREETING=$(echo no) 'quoted'"),
]
COMMAND = GUIDE[GUIDE.index("--") :]


def written(capfd: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main([*OPTIONS, *words, *COMMAND]) == 0
    return list(yaml.safe_load_all(capfd.readouterr().out))


def template_of(job: dict[str, Any], role: str = "Master") -> dict[str, Any]:
    if job["kind"] == "JobSet":
        return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    return job["spec"]["pytorchReplicaSpecs"][role]["template"]


def validate(resource: dict[str, Any]) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(resource, version, strict=True)


def fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists, by their paths."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from fields(item, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from fields(item, f"{path}[{number}]")
    else:
        yield path, value


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_pods_and_policy_are_valid_and_without_privileges(capfd: pytest.CaptureFixture[str], kind: str) -> None:
    policy, job = written(capfd, "--kind", kind, "--nnodes", "3:4", "--namespace", "team")
    template = template_of(job)
    validate(policy)
    validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, "spec": template["spec"]}
    )
    if kind == "jobset":
        spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
        validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec})
    (container,) = template["spec"]["containers"]
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "1Ti"},
        "limits": {"memory": "1Ti", "nvidia.com/gpu": "8"},
    }
    assert template["spec"]["terminationGracePeriodSeconds"] == 120 + k8s.GRACE_MARGIN_SECONDS
    in_memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert in_memory in template["spec"]["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert policy["spec"]["podSelector"]["matchLabels"] == template["metadata"]["labels"]
    assert {"name": "GREETING", "value": "$$(echo no) 'quoted'"} in container["env"]


def test_a_validator_would_see_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    _, job = written(capfd, "--nnodes", "2")
    spec = template_of(job)["spec"] | {"restartPolicies": "Never"}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})


def test_a_jobset_is_what_its_client_knows(capfd: pytest.CaptureFixture[str]) -> None:
    _, job = written(capfd, "--nnodes", "2:4")
    read = JobsetV1alpha2JobSet.from_dict(job)
    assert read is not None
    assert dict(fields(read.to_dict())) == dict(fields(job)), "a field is unknown"
    rules = job["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    by_code = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert by_code == {75: "Ignore", 1: "FailJob", 2: "FailJob"}


@pytest.mark.parametrize("num_pods", [1, 4])
def test_a_pytorchjob_is_what_its_client_knows(capfd: pytest.CaptureFixture[str], num_pods: int) -> None:
    _, job = written(capfd, "--kind", "pytorchjob", "--nnodes", str(num_pods))

    client = ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    assert dict(fields(client.sanitize_for_serialization(read))) == dict(fields(job)), "a field is unknown"
    replicas = {role: spec["replicas"] for role, spec in job["spec"]["pytorchReplicaSpecs"].items()}
    assert replicas == ({"Master": 1} if num_pods == 1 else {"Master": 1, "Worker": 3})


def test_no_secret_gets_into_a_manifest(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    _, job = written(capfd, "--nnodes", "2")
    assert "a-very-secret-value" not in yaml.safe_dump(job)
    variables = {variable["name"]: variable for variable in template_of(job)["spec"]["containers"][0]["env"]}
    assert variables["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert variables["SPADE_T5_LAUNCH_TOKEN"]["valueFrom"] == {
        "secretKeyRef": {"name": "base-launch-token", "key": "token"}
    }
    for words in (["--env", "HF_TOKEN=abcdefgh"], ["--env", "SOURCE=https://ann:pass@host/"]):
        assert main([*OPTIONS, "--nnodes", "2", *words, *COMMAND]) == 2
        message = capfd.readouterr().err
        assert "pass" not in message
        assert "abcdefgh" not in message
        documented(message)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--nnodes", "2", "--name", "Base"], COMMAND),
        (["--nnodes", "2", "--volume", "runs"], COMMAND),
        (["--nnodes", "2", "--secret", "KEY=value"], COMMAND),
        (["--nnodes", "2", "--env", "NAME"], COMMAND),
        (["--nnodes", "2", "--env", "POD_IP=1"], COMMAND),
        (["--nnodes", "2", "--user", "0"], COMMAND),
        (["--nnodes", "2", "--memory-per-node", "much"], COMMAND),
        ([], ["--", "pretrain", "demo", "run_dir=runs/base"]),
        (["--nnodes", "2", "--out", "/no/such/folder/file"], COMMAND),
    ],
)
def test_what_cannot_be_written_is_one_message(
    capfd: pytest.CaptureFixture[str], words: list[str], command: list[str]
) -> None:
    assert main([*OPTIONS, *words, *command]) == 2
    documented(capfd.readouterr().err)


class Pod:
    """The container of a pod as a process, with the variables that the cluster gives it."""

    def __init__(self, container: dict[str, Any], given: dict[str, str], words: Mapping[str, str], log: Path) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **given}
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        secrets = {"base-launch-token/token": "0123456789abcdef", "wandb/key": "a-very-secret-value"}
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                variable["value"] = secrets["/".join(source["secretKeyRef"].values())]
            elif "fieldRef" in source:
                variable["value"] = "127.0.0.1"
            variables[variable["name"]] = variable["value"].replace("$$(", "$(")
        command = [*container["command"], *container["args"]]
        for old, new in {"$(POD_IP)": "127.0.0.1", **words}.items():
            command = [word.replace(old, new) for word in command]
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, env=variables, stdout=out, stderr=out, start_new_session=True)

    def wait(self) -> int:
        return self.process.wait(240)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start_pods(
    stack: ExitStack, capfd: pytest.CaptureFixture[str], tmp_path: Path, kind: str, command: list[str], *options: str
) -> list[Pod]:
    """Two pods of a manifest, the second first."""
    words = [
        *OPTIONS,
        "--kind",
        kind,
        "--nproc-per-node",
        "1",
        "--nnodes",
        "2",
        "--volume",
        f"tmp:{tmp_path}",
        *options,
        "--",
        *command,
    ]
    assert main(words) == 0
    _, job = yaml.safe_load_all(capfd.readouterr().out)
    host = {"jobset": "base-node-0-0.base", "pytorchjob": "base-master-0"}[kind]
    place = {f"{host}:{k8s.PORT}": f"localhost:{free_port()}"}
    pods = []
    for index in (1, 0):
        given = {"JOB_COMPLETION_INDEX": str(index)}
        if kind == "pytorchjob":  # what its operator sets for torchrun
            given = {
                "RANK": str(index),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": host,
                "PET_NNODES": "2",
                "PET_NPROC_PER_NODE": "7",
            }
        (container,) = template_of(job, "Worker" if index else "Master")["spec"]["containers"]
        pods.append(Pod(container, given, place, tmp_path / f"pod-{index}.log"))
        stack.callback(pods[-1].kill)
    return pods[::-1]


def test_the_pods_of_a_manifest_train_together(store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=6, loader_workers=0)
    with launch_ranks(
        ["pretrain", str(recipe), f"run_dir={tmp_path / 'undisturbed'}"], num_ranks=2, log_dir=tmp_path / "logs"
    ) as group:
        assert group.wait() == [0, 0], group.errors()
    with ExitStack() as stack:
        pods = start_pods(stack, capfd, tmp_path, "jobset", ["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"])
        assert [pod.wait() for pod in pods] == [0, 0], [pod.log.read_text() for pod in pods]
    assert_exact(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_a_pod_that_is_asked_to_stop_stops_all(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=1000, loader_workers=0)
    run_dir = tmp_path / "run"
    with ExitStack() as stack:
        pods = start_pods(stack, capfd, tmp_path, kind, ["pretrain", str(recipe), f"run_dir={run_dir}"])
        while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
            assert pods[0].process.poll() is None, pods[0].log.read_text()
            signal.sigtimedwait([], 0.2)
        pods[1].process.send_signal(signal.SIGTERM)
        codes = [pod.wait() for pod in pods]
    assert codes == ([75, 75] if kind == "jobset" else [k8s.RETRIED_CODE] * 2), [pod.log.read_text() for pod in pods]
    assert "stopped at step" in pods[0].log.read_text()


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_exit_code_of_all_pods_is_that_of_the_ranks(
    code: int, store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", [store], steps=5)
    words = ["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]
    if code == 2:
        words.append("training.deepspeed=null")
    else:
        monkeypatch.setenv("PYTHONPATH", ranks_that_end(tmp_path, code)["PYTHONPATH"])
    with ExitStack() as stack:
        pods = start_pods(stack, capfd, tmp_path, "jobset", words, "--max-restarts", "0")
        assert [pod.wait() for pod in pods] == [code, code], [pod.log.read_text() for pod in pods]

"""Writes the manifests of a run on Kubernetes, for `kubectl apply -f -`: a JobSet or a PyTorchJob, and who may connect to its pods.

Every pod runs `spade-t5 launch pod`. Nothing in a manifest is secret: variables that are come from Secrets of the cluster, and so does the
launch's own, by which pods know each other.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from spade_t5.errors import ConfigError
from spade_t5.launch import options
from spade_t5.launch.accelerate_config import add_shape_option, take_over_shape
from spade_t5.launch.cli import EXIT_FAULT, EXIT_USER_ERROR
from spade_t5.launch.node import SECRET_VARIABLE
from spade_t5.launch.written import check_written
from spade_t5.messages import shown
from spade_t5.training.stopping import EXIT_STOPPED

Manifest = dict[str, Any]

PORT = 29400
"""Where the first pod listens for the others."""
GRACE_MARGIN_SECONDS = 60
"""What a pod has beyond the grace of its ranks before it is killed."""
TOKEN_KEY = "token"
"""Of the Secret with the launch's own secret."""
RETRIED_CODE = 143
"""What a pod of a PyTorchJob ends with when it was asked to stop: its operator starts pods again at codes from 128 on, and at no other."""
KINDS = ("jobset", "pytorchjob")

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_SECRET_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGT]i?|Ki)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this form."""
    parser.add_argument("--kind", choices=KINDS, default="jobset", help="what the cluster has; default %(default)s")
    parser.add_argument("--name", required=True, help="of the run in the cluster, and the beginning of its pods' names")
    parser.add_argument("--namespace", help="of the run; default the one that kubectl uses")
    parser.add_argument("--image", required=True, help="container image that has spade-t5 on its PATH")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes in each pod")
    add_shape_option(parser)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of each pod (nvidia.com/gpu)")
    parser.add_argument("--cpus-per-node", metavar="N", help="CPU cores that each pod asks for, such as 32")
    parser.add_argument("--memory-per-node", metavar="SIZE", help="memory that each pod gets, such as 512Gi")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="persistent volume claim, mounted at PATH in every pod; repeatable; the run folder lies on one",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=SECRET:KEY",
        help="variable of all processes whose value a Secret of the cluster has; repeatable",
    )
    parser.add_argument(
        "--token-secret", metavar="SECRET", help="Secret with the launch's own secret; default NAME-launch-token"
    )
    parser.add_argument(
        "--user", metavar="UID[:GID]", help="user and group of the processes; default those of the image"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="file for the manifests; default the standard output")
    parser.add_argument(
        "--nnodes", type=options.node_range, metavar="MIN:MAX", help="pods, and how few the run goes on with"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable of all processes; repeatable"
    )
    options.add_patience(parser)
    options.add_supervision(parser)
    options.add_grace(parser)
    options.add_command(parser)


def run(arguments: argparse.Namespace) -> int:
    """Writes the manifests."""
    take_over_shape(arguments)
    text = yaml.safe_dump_all(manifests(arguments), sort_keys=False, width=2**16)
    if arguments.out is None or arguments.dry_run:
        print(text, end="")
    else:
        try:
            arguments.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: {arguments.out} cannot be written ({error.strerror})") from None
    return 0


def manifests(arguments: argparse.Namespace) -> list[Manifest]:
    """The documents of a run.

    Raises:
        ConfigError: an option or the run's config is wrong, or a secret would stand in them.
    """
    if arguments.nnodes is None:
        raise ConfigError("--nnodes: how many pods there are; give MIN:MAX or one number")
    options.check_least(arguments, nproc_per_node=1, grace=1, lost_after=1, wait_for_nodes=1)
    check_written(
        arguments.words,
        arguments.env,
        "the cluster keeps manifests",
        "make a Secret, and name it by --secret NAME=SECRET:KEY",
    )
    if not _NAME.fullmatch(arguments.name):
        raise ConfigError(
            f"--name: {shown(arguments.name)} must be at most 40 small letters, digits and dashes, first a letter"
        )
    run_dir = options.supervision_of(arguments).run_dir
    if run_dir is not None:
        _check_on_volume(run_dir, [path for _, path in _volumes(arguments)])
    make = _job_set if arguments.kind == "jobset" else _pytorch_job
    return [_network_policy(arguments), make(arguments)]


def _job_set(arguments: argparse.Namespace) -> Manifest:
    name, num_pods = arguments.name, arguments.nnodes[1]
    pods = [f"{name}-node-0-{index}" for index in range(num_pods)]
    job = {
        "parallelism": num_pods,
        "completions": num_pods,
        "completionMode": "Indexed",
        "backoffLimit": arguments.max_restarts * num_pods,  # containers that were killed, out of memory for one
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_STOPPED]}},
                # The launcher has restarted the run as often as it may, or would be refused again.
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_FAULT, EXIT_USER_ERROR]}},
            ]
        },
        "template": _pod(arguments, "spade-t5", pods, f"{pods[0]}.{name}", "JOB_COMPLETION_INDEX", EXIT_STOPPED),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(arguments),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pytorch_job(arguments: argparse.Namespace) -> Manifest:
    name, num_workers = arguments.name, arguments.nnodes[1] - 1
    pods = [f"{name}-master-0", *(f"{name}-worker-{index}" for index in range(num_workers))]
    template = _pod(arguments, "pytorch", pods, pods[0], "RANK", RETRIED_CODE)
    replicas = {"Master": 1, "Worker": num_workers}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(arguments),
        "spec": {
            "nprocPerNode": "1",
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": arguments.max_restarts * arguments.nnodes[1]},
            "pytorchReplicaSpecs": {
                role: {"replicas": number, "restartPolicy": "ExitCode", "template": template}
                for role, number in replicas.items()
                if number > 0
            },
        },
    }


def _pod(
    arguments: argparse.Namespace, container: str, pods: Sequence[str], first: str, index: str, stopped_code: int
) -> Manifest:
    """The template of all pods.

    Args:
        arguments: those of the command.
        container: name of the container.
        pods: names of the pods, in the order of their ranks.
        first: name by which the first pod is found.
        index: variable that says which of them a pod is.
        stopped_code: exit code of a pod that was asked to stop.
    """
    volumes = [{"name": "scratch", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "scratch", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(_volumes(arguments)):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    user = _user(arguments.user)
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(arguments.grace) + GRACE_MARGIN_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": container,
                "image": arguments.image,
                "command": ["spade-t5", "launch", "pod"],
                "args": _pod_words(arguments, pods, first, index, stopped_code),
                "env": _variables(arguments),
                "ports": [{"name": "launch", "containerPort": PORT, "protocol": "TCP"}],
                "resources": _resources(arguments),
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if arguments.kind == "pytorchjob":
        del spec["restartPolicy"]  # which its operator sets, by that of the replicas
    return {"metadata": {"labels": _labels(arguments)}, "spec": spec}


def _pod_words(
    arguments: argparse.Namespace, pods: Sequence[str], first: str, index: str, stopped_code: int
) -> list[str]:
    least, most = arguments.nnodes
    words = [
        *("--pods", ",".join(pods), "--index-from", index, "--coordinator", f"{first}:{PORT}"),
        *("--address", "$(POD_IP)", "--nnodes", f"{least}:{most}", "--nproc-per-node", str(arguments.nproc_per_node)),
        *("--max-restarts", str(arguments.max_restarts), "--grace", f"{arguments.grace:g}"),
        *("--lost-after", f"{arguments.lost_after:g}", "--wait-for-nodes", f"{arguments.wait_for_nodes:g}"),
        *(() if stopped_code == EXIT_STOPPED else ("--stopped-code", str(stopped_code))),
        *(() if arguments.log_dir is None else ("--log-dir", str(arguments.log_dir))),
    ]
    # $(NAME) would be filled in by the cluster.
    return [*words, "--", *(word.replace("$(", "$$(") for word in arguments.words)]


def _variables(arguments: argparse.Namespace) -> list[Manifest]:
    token = arguments.token_secret or f"{arguments.name}-launch-token"
    variables = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        _from_secret(SECRET_VARIABLE, token, TOKEN_KEY),
    ]
    for word in arguments.env:
        name, has_value, value = word.partition("=")
        if not has_value or not _VARIABLE.fullmatch(name):
            raise ConfigError(f"--env: {shown(word)} is not NAME=VALUE")
        variables.append({"name": name, "value": value.replace("$(", "$$(")})
    for word in arguments.secret:
        found = re.fullmatch(r"([^=]+)=([^:]+):([-._a-zA-Z0-9]+)", word)
        if not found or not _VARIABLE.fullmatch(found[1]) or not _SECRET_NAME.fullmatch(found[2]):
            raise ConfigError(
                f"--secret: {shown(word)} is not NAME=SECRET:KEY, a Secret of the cluster and one of its keys"
            )
        variables.append(_from_secret(*found.groups()))
    names = [str(variable["name"]) for variable in variables]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"--env: {double} is set twice; leave one of them out")
    return variables


def _from_secret(name: str, secret: str, key: str) -> Manifest:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _resources(arguments: argparse.Namespace) -> Manifest:
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    for name, value in (("cpu", arguments.cpus_per_node), ("memory", arguments.memory_per_node)):
        if value is not None:
            if not _QUANTITY.fullmatch(value):
                raise ConfigError(
                    f"--{'cpus' if name == 'cpu' else name}-per-node: {shown(value)} is no quantity such as 32 or 512Gi"
                )
            requests[name] = value
    if "memory" in requests:
        limits["memory"] = requests["memory"]
    if arguments.gpus_per_node is not None:
        options.check_least(arguments, gpus_per_node=1)
        limits["nvidia.com/gpu"] = str(arguments.gpus_per_node)
    return {name: values for name, values in (("requests", requests), ("limits", limits)) if values}


def _volumes(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Claims and where they are mounted."""
    volumes = []
    for word in arguments.volume:
        claim, _, path = word.partition(":")
        if not _SECRET_NAME.fullmatch(claim) or not PurePosixPath(path).is_absolute() or ":" in path:
            raise ConfigError(
                f"--volume: {shown(word)} is not CLAIM:PATH, a persistent volume claim and an absolute path"
            )
        volumes.append((claim, path))
    return volumes


def _check_on_volume(run_dir: Path, mounts: Sequence[str]) -> None:
    if not any(run_dir.is_relative_to(mount) for mount in mounts):
        raise ConfigError(
            f"run_dir: {run_dir} lies on no volume, and would be gone with its pod; give an absolute path on one, and --volume CLAIM:PATH"
        )


def _user(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    found = re.fullmatch(r"([1-9]\d{0,8})(?::([1-9]\d{0,8}))?", text)
    if not found:
        raise ConfigError(f"--user: {shown(text)} is not UID or UID:GID, both at least 1")
    user = {"runAsUser": int(found[1])}
    if found[2]:
        user |= {"runAsGroup": int(found[2]), "fsGroup": int(found[2])}
    return user


def _network_policy(arguments: argparse.Namespace) -> Manifest:
    """Lets nobody but the run's own pods connect to them: torch's store and collectives know no secret."""
    own = {"matchLabels": _labels(arguments)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(arguments),
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own}]}]},
    }


def _metadata(arguments: argparse.Namespace) -> Manifest:
    namespace = {} if arguments.namespace is None else {"namespace": arguments.namespace}
    return {"name": arguments.name, **namespace, "labels": _labels(arguments)}


def _labels(arguments: argparse.Namespace) -> dict[str, str]:
    return {"app.kubernetes.io/name": "spade-t5", "app.kubernetes.io/instance": arguments.name}

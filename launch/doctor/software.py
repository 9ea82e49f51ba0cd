"""Versions of what computes on a node, and the variables that steer it."""

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spade_t5
from spade_t5.errors import ConfigError
from spade_t5.launch.environment import CACHES, FORWARDED
from spade_t5.launch.requirements import check_requirements
from spade_t5.messages import is_secret_name, without_credentials
from spade_t5.training.provenance import git_revision

LIBRARIES = ("triton", "transformers", "deepspeed", "datasets", "safetensors", "numpy")
"""Those that compute or read, besides PyTorch."""

COMPARED = (*FORWARDED, "CUDA_VISIBLE_DEVICES", "FI_", "UCX_")
"""Beginnings of the names of variables that steer a run: those that a launch takes to all machines, and of each machine's own its GPUs and network libraries."""
OF_ONE_NODE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TORCHELASTIC_", *CACHES)
"""Of them those that may differ: interfaces, what torchrun tells each of its processes, and caches on a machine's own disk."""


def versions() -> dict[str, Any]:
    """Versions of Python and of libraries; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _installed(name) for name in LIBRARIES},
        "spade_t5": _installed("spade-t5"),
    }


def source() -> dict[str, Any]:
    """What this package is, beyond its version: the commit of its checkout, and a hash of its Python files."""
    package = Path(spade_t5.__file__).resolve()
    digest = hashlib.sha256()
    # Not by rglob, which leaves out the folders that are links since Python 3.13.
    for folder, folders, files in os.walk(package.parent, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                digest.update(f"{path.relative_to(package.parent)}\0".encode() + path.read_bytes())
    return {"revision": git_revision(package), "source": digest.hexdigest()}


def requirements() -> dict[str, Any]:
    """Whether every library is as new as this package needs it: None, or what is to be done."""
    try:
        check_requirements()
    except ConfigError as error:
        return {"requirements": str(error)}
    return {"requirements": None}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer a run and should be the same everywhere, without secrets."""
    named = {
        name: value
        for name, value in environment.items()
        if name.startswith(COMPARED) and not name.startswith(OF_ONE_NODE)
    }
    return {name: "***" if is_secret_name(name) else without_credentials(value) for name, value in named.items()}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

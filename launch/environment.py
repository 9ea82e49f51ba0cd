"""Variables of the ranks of a launch on many machines: those that the user's shell has, those that he names, and caches on each machine's own disk."""

import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from spade_t5.errors import ConfigError
from spade_t5.messages import is_secret_name, shown

FORWARDED = (
    *(
        "NCCL_",
        "GLOO_",
        "UCX_",
        "FI_",
        "TORCH",
        "PYTORCH_",
        "TRITON_",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "HF_",
        "OMP_",
        "MKL_",
        "OPENBLAS_",
        "CUBLAS_",
        "TOKENIZERS_",
        "WANDB_",
    ),
    "SPADE_T5_BACKEND",
)
"""Beginnings of the names of variables that go to all machines by themselves, but for secrets, which only go if they are named."""
CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
}
"""Caches that processes of many machines must not share, for they rely on locks; by the variable that says where each is."""


def forwarded(named: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that go to all machines.

    Args:
        named: words `NAME` (its value here) or `NAME=VALUE` of `--env`.
        environment: this process's.

    Raises:
        ConfigError: a word is no such thing, or the variable is not set here.
    """
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED) and not is_secret_name(name) and name not in CACHES
    }
    for word in named:
        name, has_value, value = word.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env: {shown(name)} is no name of a variable; give NAME or NAME=VALUE")
        if not has_value and name not in environment:
            raise ConfigError(f"--env: {name} is not set; set it, or give {name}=VALUE")
        variables[name] = value if has_value else environment[name]
    return variables


def machine_variables(local_address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which ranks of this machine find the network that leads to the others, and caches of their own.

    Args:
        local_address: this machine's address on that network.
        environment: what is set already, which stays.
    """
    variables = {}
    interface = _interface_of(local_address)
    if interface is not None:
        variables = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if any(name not in environment for name in CACHES):
        folder = _cache_folder()
        variables |= {name: str(folder / part) for name, part in CACHES.items()}
    return {name: value for name, value in variables.items() if name not in environment}


def _interface_of(address: str) -> str | None:
    """Name of the network interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return None


def _cache_folder() -> Path:
    """A folder on this machine that only this user can write: what lies in it is compiled code that will run."""
    folder = Path(tempfile.gettempdir()) / f"spade-t5-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="spade-t5-cache-"))
    return folder

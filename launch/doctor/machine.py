"""What a node is made of, and how much of it a process may have."""

import os
import platform
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_INFINIBAND = Path("/sys/class/infiniband")
_DRIVER = Path("/proc/driver/nvidia/version")


def system() -> dict[str, Any]:
    """Host name and operating system."""
    name = platform.system()
    with suppress(OSError, KeyError):
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    return {"host": os.uname().nodename, "os": name, "kernel": platform.release()}


def processors() -> dict[str, Any]:
    """CPU cores that this process may use, and host memory in bytes: that of the machine, or less where a container is given less."""
    return {"cores": len(os.sched_getaffinity(0)), "memory_bytes": _memory_bytes()}


def gpus() -> dict[str, Any]:
    """GPUs that this process sees, with memory in bytes, and the driver's version."""
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            found.append({"name": name, "total_bytes": total_bytes, "free_bytes": free_bytes})
    driver = None
    with suppress(OSError, IndexError):
        driver = _DRIVER.read_text(encoding="utf-8", errors="replace").split("Module", 1)[1].split()[0]
    return {"gpus": found, "driver": driver}


def limits() -> dict[str, Any]:
    """Limits of each process: soft and hard, None for no limit."""
    facts: dict[str, Any] = {
        "open_files": _limit(resource.RLIMIT_NOFILE),
        # The kernel does not count the processes of root.
        "processes": [None, None] if os.geteuid() == 0 else _limit(resource.RLIMIT_NPROC),
        "threads_in_use": _threads_of(os.getuid()),
    }
    if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()):
        facts["locked_memory"] = _limit(resource.RLIMIT_MEMLOCK)
    return facts


def _limit(kind: int) -> list[int | None]:
    return [None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(kind)]


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": as much as there is
            total = min(total, int(Path(path).read_text(encoding="ascii")))
    return total


def _threads_of(user: int) -> int:
    """Threads of all processes of a user, which is what the kernel counts as processes."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended, or is hidden
                if entry.stat().st_uid == user:
                    count += len(os.listdir(entry / "task"))
    return count

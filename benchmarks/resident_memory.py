"""Peak memory on a CPU: the growth of the resident set, in a process that has done nothing else."""

import ctypes
from pathlib import Path


def resident_bytes(*, peak: bool = False) -> int:
    """Resident set of this process, now or at its highest since `reset_peak`; getrusage would count the peak of the parent process too.

    Raises:
        RuntimeError: not on Linux.
    """
    field = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory can be measured on Linux only")


def reset_peak() -> None:
    """Let the peak begin at what is in use now.

    Freed memory that the C library has kept is given back first: what is allocated next would otherwise take it and not
    show as growth.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # of glibc
        library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

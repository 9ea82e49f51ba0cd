"""Lets the C library keep the memory of large tensors that training on a CPU frees and asks for again in every step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Serves tensors of any size from the heap and gives nothing below 2 GiB back to the system.

    glibc maps blocks above 32 MB anew at every request, and the kernel then clears them page by page: at 16,384 tokens that is a
    quarter of an encoder's time. Elsewhere than on glibc this does nothing.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)

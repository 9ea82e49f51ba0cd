"""Which implementation of an op runs. The list is the same for every op, so that one word chooses for the whole model.

`naive` is the readable reference and is never chosen by itself; `torch` is plain PyTorch written for speed and runs on
every device; `triton` needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1 before the first import) for
tests on a CPU.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

BACKENDS = ("auto", "triton", "torch", "naive")

# Both are fixed when Triton is imported, so they are looked up once; constants also keep torch.compile from tracing it.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y", "t")


_traced: tuple[str, str] | None = None


@contextlib.contextmanager
def traced_as(backend: str, architecture: str) -> Iterator[None]:
    """Within it every op takes one backend, wherever its tensors are: to trace on fake tensors what another machine would keep.

    Args:
        backend: "triton" or "torch".
        architecture: of the GPU, such as "sm_90".
    """
    global _traced
    _traced = (backend, architecture)
    try:
        yield
    finally:
        _traced = None


def traced() -> tuple[str, str] | None:
    """Backend and architecture of `traced_as`; None outside of it, where tensors hold values."""
    return _traced


def choose_backend(backend: str, device: torch.device) -> str:
    """Replace "auto" by the backend that serves the device, and refuse a name that cannot serve.

    Args:
        backend: "auto" (Triton on a CUDA device, torch elsewhere), "triton", "torch" or "naive".
        device: where the tensors are.

    Returns:
        "triton", "torch" or "naive".

    Raises:
        ValueError: the backend does not exist or cannot run there; the message says why. "auto" fails too where Triton
            should serve and is missing: a model that is slow without a word is worse than one that does not start.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if _traced is not None:
        return _traced[0]
    chosen = backend
    if backend == "auto":
        chosen = "triton" if device.type == "cuda" else "torch"
    if chosen == "triton":
        problem = _why_no_triton(device)
        if problem is not None:
            raise ValueError(f"backend={backend!r}: Triton kernels cannot run: {problem}")
    return chosen


def refuse_double(**tensors: torch.Tensor) -> None:
    """Raise ValueError if one of the named tensors is float64, which the Triton kernels do not compute in."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is float64: the Triton kernels take float32, bfloat16 and float16; choose backend 'torch'"
            )


def _why_no_triton(device: torch.device) -> str | None:
    if not _HAS_TRITON:
        return "the package triton is not installed; run `pip install triton`, or choose backend 'torch'"
    if device.type == "cuda" or (device.type == "cpu" and _IS_INTERPRETED):
        return None
    return f"the tensors are on {device} and the kernels need a CUDA device; choose backend 'torch'"

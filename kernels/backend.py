"""Which implementation of an op runs. The list is the same for every op, so that one word chooses for the whole model.

`naive` is the readable reference and is never chosen by itself; `torch` is plain PyTorch written for speed and runs on
every device.
"""

BACKENDS = ("auto", "torch", "naive")


def choose_backend(backend: str) -> str:
    """Replace "auto" by the backend that serves, and refuse a name that cannot serve.

    Args:
        backend: "auto", "torch" or "naive".

    Returns:
        "torch" or "naive".

    Raises:
        ValueError: the backend does not exist or is not available; the message says why.
    """
    if backend == "triton":
        raise ValueError("backend='triton' is not available: this version has no Triton kernels; use 'auto' or 'torch'")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    return "torch" if backend == "auto" else backend

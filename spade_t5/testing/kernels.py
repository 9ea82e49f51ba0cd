"""Comparison of kernels with their references."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

RELATIVE_BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative error, in norm, of an output or gradient against float64, by the dtype of the inputs."""


def assert_near(name: str, actual: Tensor, exact: Tensor, bound: float | None = None) -> None:
    """Check ||actual - exact|| <= bound ||exact|| and that every entry is finite.

    Args:
        name: of the tensor, for the message.
        actual: result under test.
        exact: reference, computed in float64 from the same (rounded) inputs.
        bound: relative to the norm of `exact`; None: of `RELATIVE_BOUNDS`. An `exact` of zero must be met exactly.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    bound = RELATIVE_BOUNDS[actual.dtype] if bound is None else bound
    error, size = (actual.double() - exact.double()).norm().item(), exact.double().norm().item()
    assert error <= bound * size, f"{name}: relative error {error / size if size else error:.2e}, bound {bound:.0e}"


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that an output that no program writes is seen."""
    # deterministic algorithms fill what they allocate, unless torch.utils.deterministic.fill_uninitialized_memory is off
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)

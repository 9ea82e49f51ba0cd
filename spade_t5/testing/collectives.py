"""Writes down every collective that a rank takes part in: what a model of communication says is compared with what is sent.

    with recorded_collectives() as calls:
        ...
    calls[0].kind, calls[0].nbytes

Functions of `torch.distributed` are replaced, so it must begin before DeepSpeed joins the group: DeepSpeed keeps some of them for good.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

WHOLE_BUFFER = {
    "all_reduce": "tensor",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter_tensor": "input",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor_list",
    "reduce_scatter": "input_list",
    "all_to_all_single": "output",
    "gather": "tensor",
    "scatter": "tensor",
    "send": "tensor",
    "recv": "tensor",
    "isend": "tensor",
    "irecv": "tensor",
    "barrier": None,
}
"""Function of `torch.distributed` to its argument that has the size of what a rank holds before or after."""


class RecordedCall(NamedTuple):
    """One collective."""

    kind: str
    """The function's name, without the suffix that says how its buffers lie."""
    nbytes: int
    """Bytes of the whole buffer."""
    num_ranks: int
    """Size of the group."""


@contextmanager
def recorded_collectives() -> Iterator[list[RecordedCall]]:
    """Context whose value grows by every call; one that a function makes inside another is not counted."""
    calls: list[RecordedCall] = []
    is_inside = False

    def recorded(name: str, function: Callable[..., Any], argument: str | None) -> Callable[..., Any]:
        parameters = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(*args, **kwargs)
            given = parameters.bind(*args, **kwargs).arguments
            nbytes = 0 if argument is None else _nbytes(given[argument])
            calls.append(RecordedCall(_kind(name), nbytes, dist.get_world_size(given.get("group"))))
            is_inside = True
            try:
                return function(*args, **kwargs)
            finally:
                is_inside = False

        return wrapper

    originals = {name: getattr(distributed_c10d, name) for name in WHOLE_BUFFER}
    for name, function in originals.items():
        _replace(name, recorded(name, function, WHOLE_BUFFER[name]))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            _replace(name, function)


def _replace(name: str, function: Callable[..., Any]) -> None:
    for module in (distributed_c10d, dist):  # the second has names of the first
        setattr(module, name, function)


def _kind(name: str) -> str:
    return name.removesuffix("_into_tensor").removesuffix("_tensor")


def _nbytes(buffer: Any) -> int:
    tensors = [buffer] if isinstance(buffer, torch.Tensor) else buffer
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

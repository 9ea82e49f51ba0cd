"""How Triton kernels are launched: block sizes, warps and stages, from a table in a data file beside each op.

`<op>/launch_configs.json` maps a GPU architecture and a variant of the kernel (head size, window class, ...) to the
meta-parameters of its launch. Nothing is tuned at run time: packed batches change their shape in every step, and a tuner
keyed on shapes would never end. `spade-t5 bench kernels --tune` measures the candidates and rewrites the tables.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op
from triton import knobs

from spade_t5.kernels.backend import traced

LaunchConfig = dict[str, int]
"""Keyword arguments of a launch: the kernel's block sizes, num_warps, num_stages."""

INTERPRETER = "interpreter"
"""Architecture whose configurations serve Triton's interpreter: small blocks, as short tests must cross their edges."""


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator that makes a host function the operator `spade_t5::name`: one node for torch.compile and autograd.

    The function changes no argument, returns new tensors, and runs on the GPU that its tensors are on, whichever is
    current: Triton launches on the current one.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def on_its_device(*arguments: Any) -> Any:
            with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
                return function(*arguments)

        return custom_op(f"spade_t5::{name}", on_its_device, mutates_args=())

    return register


def launch_config(op: str, variant: str, device: torch.device) -> LaunchConfig:
    """Meta-parameters of one kernel launch.

    Args:
        op: folder of the op, such as "local_attention".
        variant: kernel and class of problem as the op names them, such as "fwd/d64/narrow".
        device: decides the architecture; one that has no entry of its own takes the nearest older one's.

    Returns:
        keyword arguments for the launch.
    """
    return launch_config_on(op, variant, architecture(device))


def launch_config_on(op: str, variant: str, wanted: str) -> LaunchConfig:
    """The same for an architecture that need not be this machine's."""
    return _lookup(op, variant, wanted)


def architecture(device: torch.device) -> str:
    """Key of the tables: "sm_90" for a Hopper GPU, "interpreter" when kernels are interpreted."""
    if (assumed := traced()) is not None:
        return assumed[1]
    return INTERPRETER if knobs.runtime.interpret else _compute_capability(device.index)


def must_upcast(*tensors: torch.Tensor) -> bool:
    """Whether loaded values must be widened to float32 at once: the interpreter computes garbage on bfloat16."""
    return bool(knobs.runtime.interpret) and any(tensor.dtype == torch.bfloat16 for tensor in tensors)


def adjacent_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) as (X, D) with adjacent columns: a view, of a half of a fused projection too, where the strides allow one."""
    x_XD = x.reshape(-1, x.shape[-1])
    return x_XD if x_XD.stride(1) == 1 else x_XD.contiguous()


@functools.cache
def _compute_capability(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.cache
def _lookup(op: str, variant: str, wanted: str) -> LaunchConfig:
    configs: dict[str, dict[str, LaunchConfig]] = json.loads(table_path(op).read_text(encoding="utf-8"))["configs"]
    if wanted in configs:
        return configs[wanted][variant]
    number = int(wanted.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in configs if name != INTERPRETER)
    older = [candidate for candidate in known if candidate <= number]
    return configs[f"sm_{older[-1] if older else known[0]}"][variant]


def table_path(op: str) -> Path:
    """The data file of an op."""
    return Path(__file__).parent / op / "launch_configs.json"

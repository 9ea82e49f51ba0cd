"""`torch.compile` for each block of a model: every encoder and decoder layer by itself, not the whole model.

Layers of the same shape share a graph, so a deep model compiles as fast as a shallow one, names of parameters stay what they are, and
hooks of the engine around the layers go on working. Attention document by document, and what loops over blocks or documents on a CPU,
stays outside of the graphs (`spade_t5.ops`): their sizes depend on the ids, and every batch would compile anew.
"""

import shutil

import torch
from torch import nn
from torch._inductor import config as inductor_config

from spade_t5.errors import ConfigError
from spade_t5.training import distributed


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Lets every block be compiled when it first runs.

    Args:
        model: a Hugging Face model; its blocks are the modules that a device map must not split.
        backend: of `torch.compile`.

    Raises:
        ConfigError: there is no compiler for what runs on a CPU.
    """
    if distributed.device().type == "cpu" and backend == "inductor" and not _has_cpp_compiler():
        raise ConfigError(
            "training.compile: on a CPU this needs a C++ compiler, and none is on the PATH; install g++, or set training.compile=false"
        )
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):  # type: ignore[operator]
            module.compile(backend=backend)
    # One more for each kind of layer, with and without documents, in training and evaluation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)


def _has_cpp_compiler() -> bool:
    # Inductor's own setting, which CXX fills.
    return any(shutil.which(name) for name in inductor_config.cpp.cxx if name)

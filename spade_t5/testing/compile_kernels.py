"""Compile every Triton kernel for a GPU that need not be present, and report what the machine code holds.

    python -m spade_t5.testing.compile_kernels --arch 90 [--op local_attention] > report.json

The ops are called on small CPU tensors exactly as a model calls them; each launch is caught, its arguments are turned
into a signature, and the kernel is compiled for the architecture with the launch configuration of that architecture.
Nothing runs on a GPU. The report is a JSON list, one entry a kernel variant: registers, bytes of spills and of shared
memory, and counts of tensor-core instructions.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from spade_t5.kernels import backend, launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_LARGEST_INT32 = 2**31 - 1


class _Compiler:
    """Stands in for the launch of a kernel."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.case = ""
        self.report: list[dict[str, Any]] = []
        self.seen: set[str] = set()

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        parameters = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(parameters, args, strict=False)) | kwargs
        constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        signature: dict[str, str] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, name in enumerate(parameters):
            value = arguments[name]
            signature[name], is_divisible = _type_of(value, name in constants, name in unspecialized)
            if signature[name] == "constexpr":
                constexprs[(i,)] = value
            elif is_divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = repr((kernel.fn.__name__, signature, constexprs, attributes, options))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=self.target, options=options)
        self.report.append(
            {
                "kernel": kernel.fn.__name__,
                "case": self.case,
                "architecture": f"sm_{self.target.arch}",
                "triton": triton.__version__,
                "options": options,
                "blocks": {parameters[i]: value for (i,), value in constexprs.items() if parameters[i].isupper()},
                "shared_bytes": compiled.metadata.shared,
                **_inspect(compiled.asm["cubin"]),
            }
        )


def _type_of(value: Any, is_constexpr: bool, is_unspecialized: bool) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether the kernel may rely on its being a multiple of 16 (bytes)."""
    is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
    if is_constexpr or value is None or (is_one and not is_unspecialized):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return "i32" if abs(value) <= _LARGEST_INT32 else "i64", value % 16 == 0 and not is_unspecialized
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"argument of type {type(value)}")


def _inspect(cubin: bytes) -> dict[str, int]:
    """Registers, spills and tensor-core instructions of machine code, read with the tool that Triton's wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    count = {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "HMMA", "LDL", "STL", "ATOMG", "RED")}
    return {"registers": int(registers), "stack_bytes": int(stack)} | {name.lower(): n for name, n in count.items()}


def main() -> None:
    """Compile the cases of `compile_cases` of every op's triton_op module and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot: 90, 80")
    parser.add_argument("--op", action="append", help="folder of an op; default: all that have Triton kernels")
    options = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")

    folder = Path(backend.__file__).parent
    ops = options.op or sorted(path.parent.name for path in folder.glob("*/triton_op.py"))
    compiler = _Compiler(options.arch)
    JITFunction.run = lambda self, *args, **kwargs: compiler.run(self, *args, **kwargs)
    launch.architecture = lambda device: f"sm_{options.arch}"
    for op in ops:
        cases = importlib.import_module(f"spade_t5.testing.compile_cases.{op}").CASES
        for name, call in cases.items():
            compiler.case = f"{op}/{name}"
            print(compiler.case, file=sys.stderr)
            call()
    json.dump(compiler.report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()

"""Files of tensors: as safetensors writes them, hashed on the way; headers that lie are refused before anything is allocated."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spade_t5.checkpoint.manifest import file_sha256
from spade_t5.checkpoint.tensor_file import DTYPES, HostTensor, TensorFile, write_tensors
from spade_t5.errors import DataError
from spade_t5.testing import documented

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "wide": torch.tensor([1.5, -2.5], dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.int64),
}


def on_host(tensor: torch.Tensor) -> HostTensor:
    """In two parts, as a tensor is that does not fit into one block."""
    flat = tensor.reshape(-1)
    return HostTensor(tensor.dtype, tuple(tensor.shape), [flat[:1], flat[1:]])


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, {name: on_host(tensor) for name, tensor in TENSORS.items()})
    read = load_file(path)
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert written.entry == {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"t{number}": torch.arange(3).to(dtype) for number, dtype in enumerate(DTYPES.values())}
    save_file({**tensors, **TENSORS}, path, metadata={"format": "pt"})
    with TensorFile(path) as file:
        assert set(file.names()) == {*tensors, *TENSORS}
        for name, tensor in {**tensors, **TENSORS}.items():
            assert file.dtype(name) == tensor.dtype
            assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read("matrix", 2, 5), torch.tensor([2.0, 3.0, 4.0]))
        with pytest.raises(DataError, match="holds no tensor 'other'") as refusal:
            file.read("other")
        documented(str(refusal.value))
        with pytest.raises(DataError, match="has 6 elements, asked for 2:7"):
            file.read("matrix", 2, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_that_are_not_finite_are_not_written(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.zeros(3_000_000, dtype=dtype)
    tensor[-1] = value
    with pytest.raises(ValueError, match="ema/first holds numbers that are not finite"):
        write_tensors(tmp_path / "x", {"ema/first": on_host(tensor)})


def test_the_largest_numbers_are_finite(tmp_path: Path) -> None:
    tensor = torch.tensor([torch.finfo(torch.float64).max, -torch.finfo(torch.float64).max], dtype=torch.float64)
    write_tensors(tmp_path / "x", {"x": on_host(tensor)})


def test_an_existing_file_or_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with TensorFile(tmp_path / "x.safetensors") as file:
        os.truncate(tmp_path / "x.safetensors", 100)
        with pytest.raises(DataError, match="ends too early") as refusal:
            file.read("matrix")
    documented(str(refusal.value))


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, Any] = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "gap": {"a": entry(0, 8), "b": entry(12, 20)},
    "too short for its shape": {"a": entry(0, 4), "b": entry(4, 16)},
    "beyond the end": {"a": entry(0, 8), "b": entry(8, 16), "c": entry(16, 24)},
    "less than the file": {"a": entry(0, 8)},
    "negative": {"a": entry(0, 8), "b": entry(8, 16, (-1, -2))},
    "backwards": {"a": entry(0, 16, (4,)), "b": entry(16, 8)},
    "huge shape": {"a": entry(0, 16, (2**40, 2**40))},
    "shape that is no list": {"a": entry(0, 16, 4)},
    "shape of fractions": {"a": entry(0, 16, (4.0,))},
    "booleans": {"a": entry(False, 16, (4,))},
    "strings": {"a": entry("0", "16", (4,))},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "unknown type": {"a": entry(0, 16, (4,), "F8")},
    "type that cannot be a key": {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
    "list": [1, 2],
    "number": 3,
    "null": None,
    "entry that is no mapping": {"a": 3},
}


def refused(path: Path) -> str:
    """The message of the refusal."""
    tracemalloc.start()
    with pytest.raises(DataError) as refusal, TensorFile(path):
        pass
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100e6
    assert path.name in str(refusal.value)
    documented(str(refusal.value))
    return str(refusal.value)


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_do_not_fit_their_file(lie: str, tmp_path: Path) -> None:
    text = json.dumps(LIES[lie]).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    refused(tmp_path / "x.safetensors")


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 8))
    text = f'{{"a": {one}, "a": {one}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", b"[" * 400_000, b"{}", b"\xff" * 100], ids=len)
def test_headers_that_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(3))
    refused(tmp_path / "y.safetensors")


@pytest.mark.parametrize("length", [150 << 20, 2**40, 2**64 - 1])
def test_a_huge_header_is_not_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(200 << 20)  # takes no room on the disk
    assert f"a header of {length} bytes" in refused(path)


def test_a_link_is_not_followed_and_a_pipe_not_waited_for(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "real.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "real.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("link", "pipe"):
        refused(tmp_path / f"{name}.safetensors")

"""No pickle is ever loaded: a payload in every kind of file that is read from others never runs, and its file is named."""

import io
import json
import logging
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from spade_t5.data.files import BadRows, read_rows
from spade_t5.data.pydocs import read_pydocs
from spade_t5.errors import DataError
from spade_t5.finetune.sources import HubSource
from spade_t5.launch.cli import main
from spade_t5.pretrain.store import TokenStore
from spade_t5.testing import documented

Refused = Callable[[Sequence[str | Path]], str]
PICKLED_BESIDE = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.bin",
    "tf_model.h5",
    "embeddings.npy",
    "special_tokens.pkl",
)


def torch_file(payload: bytes) -> bytes:
    """A file as `torch.save` writes it, around the payload."""
    file = io.BytesIO()
    torch.save(_Holder(payload), file)
    return file.getvalue()


class _Holder:
    """Pickles to `pickle.loads(payload)`."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    def __reduce__(self) -> tuple[object, ...]:
        return (pickle.loads, (self.payload,))


def numpy_file(payload: bytes) -> bytes:
    """A file of `numpy.save` with an array of objects, one of which is the payload."""
    file = io.BytesIO()
    np.save(file, np.array([_Holder(payload)], dtype=object), allow_pickle=True)
    return file.getvalue()


def all_kinds(payload: bytes) -> list[bytes]:
    return [payload, torch_file(payload), numpy_file(payload)]


def generate(folder: Path, text: Path) -> list[str | Path]:
    return ["generate", folder, "--input", text, "--max-new-tokens", "2"]


def test_the_payload_would_run(payload: bytes, marker: Path) -> None:
    for content, load in (
        (payload, pickle.loads),
        (torch_file(payload), lambda content: torch.load(io.BytesIO(content), weights_only=False)),
        (numpy_file(payload), lambda content: np.load(io.BytesIO(content), allow_pickle=True)),
    ):
        assert not marker.exists()
        load(content)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_in_place_of_a_file_of_an_exported_model(
    name: str, model_folder: Path, payload: bytes, text: Path, refused: Refused
) -> None:
    assert main([str(word) for word in generate(model_folder, text)]) == 0
    for content in all_kinds(payload):
        (model_folder / name).write_bytes(content)
        line = refused(generate(model_folder, text))
        assert str(model_folder) in line
        assert name in line or name.startswith("tokenizer")


def test_beside_the_files_of_an_exported_model(model_folder: Path, payload: bytes, text: Path) -> None:
    for name in PICKLED_BESIDE:
        (model_folder / name).write_bytes(torch_file(payload))
    assert main([str(word) for word in generate(model_folder, text)]) == 0


@pytest.mark.parametrize("others", [[], ["pytorch_model.bin.index.json", "training_args.bin"]])
def test_pickled_weights_alone(
    others: list[str], model_folder: Path, payload: bytes, text: Path, refused: Refused, tmp_path: Path
) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(torch_file(payload))
    for name in others:
        (model_folder / name).write_text(json.dumps({"weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    for words in (generate(model_folder, text), ["convert", model_folder, "--out", tmp_path / "out"]):
        line = refused(words)
        assert f"{model_folder}: pytorch_model.bin is not read" in line
        assert "converted to safetensors" in line
    assert not (tmp_path / "out").exists()


def test_pickled_weights_in_an_index(model_folder: Path, payload: bytes, text: Path, refused: Refused) -> None:
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model-00001-of-00001.bin").write_bytes(torch_file(payload))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names 'pytorch_model-00001-of-00001.bin'; only .safetensors are read" in refused(
        generate(model_folder, text)
    )
    # a pickle that calls itself safetensors
    index["weight_map"] = {"lm_head.weight": "model-00001.safetensors"}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_folder / "model-00001.safetensors").write_bytes(torch_file(payload))
    assert "model-00001.safetensors: not a safetensors file" in refused(generate(model_folder, text))


def test_in_a_model_to_convert(tmp_path: Path, tokenizer: Path, payload: bytes, refused: Refused) -> None:
    folder = tmp_path / "t5"
    config = T5Config(vocab_size=768, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    words = ["convert", folder, "--out", tmp_path / "out"]
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for content in all_kinds(payload):
            (folder / name).write_bytes(content)
            assert str(folder) in refused(words)
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()
    assert main([str(word) for word in words]) == 0


def test_in_a_sentencepiece_model(tmp_path: Path, payload: bytes, refused: Refused) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "some.model", tmp_path / "folder" / "spiece.model"):
        for content in all_kinds(payload):
            path.write_bytes(content)
            words = ["prepare", "corpus.name=pydocs", "corpus.packages=[json]", f"out={tmp_path / 'out'}"]
            line = refused([*words, f"tokenizer={path if path.parent == tmp_path else path.parent}"])
            assert "not a SentencePiece model" in line


def test_in_a_token_store(tmp_path: Path, tokenizer: Path, payload: bytes, refused: Refused) -> None:
    store = tmp_path / "store"
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,textwrap]"]
    assert main(["prepare", *corpus, f"tokenizer={tokenizer}", f"out={store}"]) == 0
    files = sorted(path for path in store.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".arrow", ".json", ".jsonl"}
    for path in files:
        whole = path.read_bytes()
        for content in all_kinds(payload):
            path.write_bytes(content.ljust(len(whole), b"\0"))  # so that its size tells nothing
            assert str(path) in refused(["verify", store])
            if path.suffix == ".arrow":  # training does not look at hashes
                split = TokenStore.open(store).split("train" if ".train." in path.name else "validation")
                with pytest.raises(DataError, match=r"no shard of a token store") as caught:
                    split.tokens(0, 1)
                documented(str(caught.value))
        path.write_bytes(whole)
    assert main(["verify", str(store)]) == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".tsv", ".txt", ".jsonl.zst", ".parquet"])
def test_in_rows(suffix: str, tmp_path: Path, payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"rows{suffix}"
    for content in all_kinds(payload):
        path.write_bytes(content)
        bad_rows = BadRows()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rows = list(read_rows(path, bad_rows=bad_rows, required={"text": str}))
        assert bad_rows.count
        assert str(path) in caplog.text
        if suffix != ".txt":  # lines of it may happen to be text
            assert not rows


def test_in_the_metadata_of_arrow_and_parquet(tmp_path: Path, payload: bytes) -> None:
    # pyarrow before 14.0.1 unpickled this on reading
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=metadata)])
    table = pyarrow.table({"text": ["a"]}).cast(schema)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), schema) as writer:
        writer.write_table(table)
    rows = list(read_rows(tmp_path / "rows.parquet", bad_rows=BadRows()))
    assert [row.fields for row in rows] == [{"text": "a"}]
    with pyarrow.memory_map(str(tmp_path / "rows.arrow")) as source:
        assert pyarrow.ipc.open_file(source).get_batch(0).column(0).to_pylist() == ["a"]


def test_in_the_cache_of_the_built_in_corpus(tmp_path: Path, payload: bytes) -> None:
    docs = read_pydocs(("textwrap",), cache_dir=tmp_path, num_processes=1)
    (cached,) = tmp_path.glob("pydocs-*")
    for content in [*all_kinds(payload), b'["a"]\n', b"[1, 2, 3, 4, 5, 6]\n", b"[" * 100_000]:
        cached.write_bytes(content)
        assert read_pydocs(("textwrap",), cache_dir=tmp_path, num_processes=1) == docs


def test_in_a_data_set_folder(tmp_path: Path, payload: bytes, marker: Path) -> None:
    folder = tmp_path / "data_set"
    folder.mkdir()
    (folder / "data.pkl").write_bytes(payload)
    (folder / "data_set.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be loaded"):
        list(HubSource(dataset=str(folder)).rows("train"))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:builtins.open [{marker}, w]",
        "!!python/object/new:builtins.open [{marker}, w]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
    ],
)
def test_in_a_config_file(tag: str, tmp_path: Path, marker: Path, refused: Refused) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: {tag.format(marker=marker)}\n")
    line = refused(["pretrain", path])
    assert f"config file {path}: not valid YAML" in line
    line = refused(["pretrain", "demo", f"run_dir={tag.format(marker=marker)}"])
    assert "is not a YAML value" in line

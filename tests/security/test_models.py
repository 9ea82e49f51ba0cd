"""Models and tokenizers from others: what their files ask for, claim and point at is looked at before it is believed."""

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from spade_t5.errors import ConfigError, UserError
from spade_t5.hf.conversion import convert_checkpoint
from spade_t5.hf.folders import MODEL_FILES, local_folder
from spade_t5.hf.loading import load_model, load_tokenizer_of
from spade_t5.hf.tokenizer import load_tokenizer
from spade_t5.launch.cli import main
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.testing import documented

Refused = Callable[[Sequence[str | Path]], str]
Header = dict[str, Any]


def message(act: Callable[[], object]) -> str:
    """What an act that must be refused is refused with; the failure cookbook knows it."""
    with pytest.raises(UserError) as caught:
        act()
    text = str(caught.value)
    documented(text)
    assert "\n" not in text
    return text


def load(folder: Path) -> SpadeT5ForConditionalGeneration:
    return load_model(folder, SpadeT5ForConditionalGeneration)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_header(path: Path, change: Callable[[Header], Header | str]) -> None:
    """Rewrites the header of a safetensors file; the tensors stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    changed = change(json.loads(content[8 : 8 + length]))
    text = (changed if isinstance(changed, str) else json.dumps(changed)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NAME = "encoder.embed_tokens.weight"


def with_entry(**values: Any) -> Callable[[Header], Header]:
    return lambda header: {**header, NAME: {**header[NAME], **values}}


def named_twice(header: Header) -> str:
    """Python's own reader would take the last one, another the first."""
    return json.dumps(header)[:-1] + f', "{NAME}": {json.dumps(header[NAME])}' + "}"


def overlapping(header: Header) -> Header:
    first, second = sorted(
        (name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )[:2]
    return {**header, second: {**header[second], "data_offsets": header[first]["data_offsets"]}}


@pytest.mark.parametrize(
    "change",
    [
        with_entry(dtype="I64"),
        with_entry(dtype="F8_E99"),
        with_entry(dtype=["F32"]),
        with_entry(shape=[768, 2**40]),
        with_entry(shape=[-768, -32]),
        with_entry(shape=[768.0, 32]),
        with_entry(shape="F32"),
        with_entry(data_offsets=[0, 2**60]),
        with_entry(data_offsets=[-4, 0]),
        with_entry(data_offsets=[0]),
        with_entry(data_offsets=None),
        overlapping,
        named_twice,
        lambda header: {name: entry for name, entry in header.items() if name != NAME},
        lambda header: [1],
        lambda header: "{" * 100_000,
        lambda header: "[" * 100_000,
        lambda header: '{"a": 1' + "0" * 10_000 + "}",
    ],
)
def test_headers_of_weights(change: Callable[[Header], Header | str], model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    change_header(path, change)
    assert str(path) in message(lambda: load(model_folder))


@pytest.mark.parametrize("claimed", [200 * 2**20, 2**63, 2**64 - 1])
def test_a_large_header_costs_no_memory(claimed: int, model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed))
    os.truncate(path, 300 * 2**20)  # a hole: it takes no room
    tracemalloc.start()
    assert f"a header of {claimed} bytes" in message(lambda: load(model_folder))
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 100, -1])
def test_weights_that_end_early(num_bytes: int, model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert str(path) in message(lambda: load(model_folder))


def test_weights_of_another_model(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    weights = load_file(path)
    for changed, expected in (
        ({**weights, NAME: weights[NAME][:-1].clone()}, f"{NAME} is torch.float32 of shape (767, 32)"),
        ({**weights, NAME: weights[NAME].long()}, f"{NAME} is torch.int64"),
        ({**weights, "extra": torch.zeros(1)}, "holds 'extra', which is no part of"),
        ({name: weights[name] for name in weights if name != NAME}, f"lacks {NAME}"),
    ):
        save_file(changed, path)
        assert expected in message(lambda: load(model_folder))


def sharded(folder: Path) -> dict[str, str]:
    """Divides the weights of a folder among two files; returns which file holds what."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in parts.items():
        save_file({name: weights[name] for name in of_file}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, of_file in parts.items() for name in of_file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "model\n.safetensors",
        "model\0.safetensors",
        3,
        None,
        ["a"],
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(name: object, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "other")
    weight_map: dict[str, Any] = {**sharded(model_folder)}
    load(model_folder)
    weight_map[NAME] = name
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert str(model_folder) in message(lambda: load(model_folder))


def test_an_index_that_lies(model_folder: Path) -> None:
    index = model_folder / "model.safetensors.index.json"
    weight_map = sharded(model_folder)
    first, second = sorted(set(weight_map.values()))
    for changed in (
        {**weight_map, NAME: second if weight_map[NAME] == first else first},
        {name: file for name, file in weight_map.items() if name != NAME},
        {**weight_map, "extra": first},
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        assert "is not where it says" in message(lambda: load(model_folder))
    for content in ("{}", '{"weight_map": []}', "[]", "{", ""):
        index.write_text(content)
        assert str(index) in message(lambda: load(model_folder))
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(model_folder / first, model_folder / second)
    assert "as does another file" in message(lambda: load(model_folder))
    (model_folder / second).unlink()
    assert second in message(lambda: load(model_folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_links_out_of_the_folder(name: str, model_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (model_folder / name).rename(outside)
    (model_folder / name).symlink_to(outside)
    read = load_tokenizer_of if name.startswith("tokenizer") else load
    assert "leads out of its folder" in message(lambda: read(model_folder))
    (model_folder / name).unlink()
    (model_folder / name).symlink_to(name)
    assert name in message(lambda: read(model_folder)) or not name.startswith("model")


def test_links_of_the_cache_of_the_hub_are_followed(model_folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(model_folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load(snapshot)
    load_tokenizer_of(snapshot)


CODE = [
    ("config.json", "auto_map", {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}),
    ("config.json", "_attn_implementation_internal", "somebody/kernels"),
    ("config.json", "_attn_implementation", "somebody/kernels"),
    ("config.json", "quantization_config", {"quant_method": "evil"}),
    ("config.json", "custom_generate", "somebody/generate"),
    ("generation_config.json", "custom_generate", "somebody/generate"),
    ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}),
]


@pytest.mark.parametrize(("file", "key", "value"), CODE)
def test_files_that_ask_for_code(file: str, key: str, value: object, model_folder: Path, marker: Path) -> None:
    (model_folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_json(model_folder / file, **{key: value})
    read = load_tokenizer_of if file.startswith("tokenizer") else load
    assert f"{model_folder / file}: {key} asks for code from elsewhere" in message(lambda: read(model_folder))


def test_code_in_a_folder_is_left_alone(model_folder: Path, marker: Path, text: Path) -> None:
    (model_folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "modeling_spade_t5.py", "tokenization.py", "setup.py", "__init__.py"):
        (model_folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
    (model_folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/model"}))
    (model_folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert main(["generate", str(model_folder), "--input", str(text), "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("d_modell", 8, "d_modell: unknown model field; did you mean 'd_model'?"),
        ("my_hook", "x", "my_hook: unknown model field"),
        ("model_type", "t5", "model_type 't5', expected 'spade_t5'"),
        ("model_type", ["spade_t5"], "expected 'spade_t5'"),
        ("d_model", "wide", "d_model: 'wide' is a str"),
        ("d_model", 10**30, "d_model: an integer of 100 bits"),
        ("dropout_rate", float("nan"), "dropout_rate: nan is not a finite number"),
        ("id2label", [1], "model: "),
        ("dtype", "float33", "model: "),
        ("tie_word_embeddings", "no", "tie_word_embeddings: 'no' is not true or false"),
        ("pad_token_id", 10**9, "pad_token_id: 1000000000 is not the number of a token"),
    ],
)
def test_settings_of_a_model(key: str, value: object, expected: str, model_folder: Path) -> None:
    change_json(model_folder / "config.json", **{key: value})
    text = message(lambda: load(model_folder))
    assert str(model_folder / "config.json") in text
    assert expected in text


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", '"text"', "[" * 100_000, "\udcff", '{"a": 1' + "0" * 5000])
def test_settings_that_are_no_object(content: str, model_folder: Path) -> None:
    path = model_folder / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(path) in message(lambda: load(model_folder))


def test_settings_of_any_size_cost_no_memory(model_folder: Path) -> None:
    os.truncate(model_folder / "config.json", 2**33)
    tracemalloc.start()
    assert "config.json: not readable as JSON" in message(lambda: load(model_folder))
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["runs/model", "./other", "a/b/c", "/nowhere/model", "~/nowhere", "a b/c", "../x", "x@y@z"]
)
def test_paths_are_not_asked_for_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *words, **_: asked.append(str(words)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert f"{name}: no such folder" in message(lambda: local_folder(name, files=MODEL_FILES))
    assert not asked


def test_the_hub_gives_named_files_of_one_revision(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("somebody/model@refs/pr/3", SpadeT5ForConditionalGeneration)
    load_tokenizer("t5-tokenizer")
    (model, tokenizer) = asked
    assert model[0] == "somebody/model"
    assert model[1]["revision"] == "refs/pr/3"
    assert tokenizer[0] == "t5-tokenizer"
    assert tokenizer[1]["revision"] is None
    for pattern in (*model[1]["allow_patterns"], *tokenizer[1]["allow_patterns"]):
        assert pattern.endswith((".json", ".safetensors", "spiece.model"))

    def fail(name: str, **options: Any) -> str:
        raise OSError("Connection error,\nsee https://ann:pass@host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    text = message(lambda: load_model("somebody/model", SpadeT5ForConditionalGeneration))
    assert text.endswith("cannot be had from the hub: Connection error, see https://***@host")


def test_a_t5_without_its_embedding_table_is_refused(tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2))
    model.save_pretrained(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    table = weights.pop("shared.weight")
    for copies in (("lm_head.weight",), ("encoder.embed_tokens.weight", "lm_head.weight")):
        save_file({**weights, **{name: table.clone() for name in copies}}, tmp_path / "old" / "model.safetensors")
        text = message(lambda: convert_checkpoint(tmp_path / "old", tmp_path / "out"))
        assert "lacks shared.weight" in text
    gone = next(name for name in weights if "SelfAttention.q" in name)
    save_file(
        {**{name: weights[name] for name in weights if name != gone}, "shared.weight": table},
        tmp_path / "old" / "model.safetensors",
    )
    assert f"lacks {gone}" in message(lambda: convert_checkpoint(tmp_path / "old", tmp_path / "out"))
    save_file({**weights, "shared.weight": table[:32].clone()}, tmp_path / "old" / "model.safetensors")
    assert "shape (32, 16)" in message(lambda: convert_checkpoint(tmp_path / "old", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_there_is_not_made_up(model_folder: Path) -> None:
    """An encoder-decoder of which only the encoder was saved would otherwise get random weights for the rest."""
    weights = load_file(model_folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if not n.startswith("decoder.")}, model_folder / "model.safetensors")
    assert "lacks decoder." in message(lambda: load(model_folder))


def test_tokenizers_that_cannot_be_used(model_folder: Path) -> None:
    whole = json.loads((model_folder / "tokenizer.json").read_text())
    for changed in (
        {**whole, "model": {"type": "Unigram", "vocab": [], "unk_id": 99}},
        {**whole, "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {**whole, "normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {**whole, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {**whole, "added_tokens": [{"id": 10**12, "content": "x"}]},
        {"version": "9"},
        [],
    ):
        (model_folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="tokenizer: ") as caught:
            load_tokenizer(model_folder)
        documented(str(caught.value))

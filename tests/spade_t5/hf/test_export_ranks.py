"""What is exported is what was trained, bit for bit, from every ZeRO stage on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from spade_t5.errors import DataError
from spade_t5.hf.loading import load_model
from spade_t5.launch.cli import main
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.testing import call_on_ranks, documented
from spade_t5.testing.runs import write_recipe
from spade_t5.training import distributed

BATCH = {
    "input_ids": torch.arange(3, 43).view(2, 20),
    "attention_mask": torch.tensor([[1] * 20, [1] * 15 + [0] * 5]),
    "decoder_input_ids": torch.arange(50, 64).view(2, 7),
}
EMBEDDINGS = "encoder.embed_tokens.weight"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap]"]
    words = [*corpus, "vocab_size=600", "num_sentinels=64", f"out={folder / 'tokenizer'}"]
    assert main(["tokenizer", *words]) == 0
    assert main(["prepare", *corpus, f"tokenizer={folder / 'tokenizer'}", f"out={folder / 'store'}"]) == 0
    return folder / "store"


def train_on_rank(recipe: str, run_dir: str, trained: str) -> bool:
    """Trains, and keeps the gathered fp32 weights and the logits of the engine's model; in a process of its own."""
    from spade_t5.training.engine import Trainer

    fit = Trainer.fit

    def fit_and_keep(trainer: Trainer) -> None:
        fit(trainer)
        keep(trainer.backend, Path(trained))

    Trainer.fit = fit_and_keep  # type: ignore[method-assign]
    assert main(["pretrain", recipe, f"run_dir={run_dir}"]) == 0
    return True


def keep(backend: Any, path: Path) -> None:
    import deepspeed

    weights = {}
    for name, parameter in backend.module.named_parameters():
        if parameter.requires_grad:
            weights[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights[name] = parameter.detach().clone()
    backend.model.eval()
    with torch.no_grad():
        weights["logits"] = backend.model(**BATCH).logits.float().clone()
    if distributed.is_main():
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


CASES = [(1, 2, True, "fp32"), (2, 2, False, "bf16"), (3, 2, False, "fp32"), (3, 1, True, "fp32")]
MORE_CASES = [
    (stage, ranks, tied, precision)
    for stage in (1, 2, 3)
    for ranks in (1, 2)
    for tied in (True, False)
    for precision in ("fp32", "bf16")
    if (stage, ranks, tied, precision) not in CASES
]


@pytest.mark.parametrize(
    ("stage", "ranks", "tied", "precision"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.faults) for case in MORE_CASES)],
)
def test_the_export_is_what_was_trained(
    stage: int, ranks: int, tied: bool, precision: str, tmp_path: Path, store: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        [store],
        model={"tie_word_embeddings": tied, "num_layers": 1, "num_decoder_layers": 1},
        steps=2,
        loader_workers=0,
        ema_decay=None,
        save_every_steps=None,
        precision=precision,
        deepspeed={"zero_stage": stage, "persistence_threshold_numel": 100},
    )
    arguments = {
        "recipe": str(recipe),
        "run_dir": str(tmp_path / "run"),
        "trained": str(tmp_path / "trained.safetensors"),
    }
    call_on_ranks(train_on_rank, arguments, num_ranks=ranks, log_dir=tmp_path / "logs")
    trained = load_file(tmp_path / "trained.safetensors")
    logits = trained.pop("logits")
    out = tmp_path / "model"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out)]) == 0

    exported = load_file(out / "model.safetensors")
    assert exported.keys() == trained.keys()
    for name, weight in trained.items():
        assert weight.dtype == exported[name].dtype == torch.float32
        assert torch.equal(exported[name], weight), name
    assert EMBEDDINGS in exported  # the one table that others are tied to
    assert ("lm_head.weight" in exported) is not tied
    assert not [path.name for path in out.iterdir() if path.suffix not in {".json", ".safetensors", ".md"}]

    theirs, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) is tied
    ours = load_model(out, SpadeT5ForConditionalGeneration)
    for model in (theirs.eval(), ours):
        with torch.no_grad():
            again = model(**BATCH).logits
        if precision == "fp32":
            assert torch.equal(again, logits)
        else:  # the training model computed with bf16 copies
            assert (again - logits).abs().max() < 0.05 * logits.abs().max()
    assert len(AutoTokenizer.from_pretrained(out)) <= exported[EMBEDDINGS].shape[0]


def test_an_export_without_its_embedding_table_is_refused(tmp_path: Path) -> None:
    from spade_t5 import SpadeT5Config

    for tied in (True, False):
        folder = tmp_path / str(tied)
        config = SpadeT5Config.from_preset("tiny", vocab_size=64, d_model=32, num_layers=1, tie_word_embeddings=tied)
        SpadeT5ForConditionalGeneration(config).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        table = weights.pop(EMBEDDINGS)
        save_file({**weights, "lm_head.weight": table}, folder / "model.safetensors")
        with pytest.raises(DataError, match=f"lacks {EMBEDDINGS}") as caught:
            load_model(folder, SpadeT5ForConditionalGeneration)
        documented(str(caught.value))


def test_damage_to_an_export_is_found(tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        [store],
        model={"num_layers": 1, "num_decoder_layers": 1},
        steps=1,
        loader_workers=0,
        deepspeed=None,
    )
    assert main(["pretrain", str(recipe), f"run_dir={tmp_path / 'run'}"]) == 0
    out = tmp_path / "model"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--max-shard-size", "900KB"]) == 0
    files = sorted(out.iterdir())
    assert len([path for path in files if path.suffix == ".safetensors"]) > 1
    assert main(["verify", str(out)]) == 0

    def found(path: Path) -> None:
        capsys.readouterr()
        assert main(["verify", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line
        documented(line)

    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[: len(whole) // 2], whole + b"\n", b""):
            path.write_bytes(damaged)
            found(path)
        path.unlink()
        found(path)
        path.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(whole)
        found(path)
        path.unlink()
        path.write_bytes(whole)
    assert main(["verify", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"] = {}
    (out / "manifest.json").write_text(json.dumps(manifest))
    found(out / "manifest.json")

"""The recipe for 16,384 tokens, from a run at 512 on: both as they are shipped, with a model that a CPU can train and as few steps."""

from pathlib import Path

import pytest
import torch

from spade_t5.checkpoint import list_checkpoints, read_state, read_weights
from spade_t5.launch.cli import main
from spade_t5.training.reporting import read_metrics

LOG_DT = "encoder.layers.0.global_mixer.log_dt"
SMALL = ["training.deepspeed=null", "training.precision=fp32", "training.loader_workers=0", "data.max_eval_rows=1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    corpus = ["corpus.name=pydocs", "corpus.packages=[json,logging,argparse,textwrap,unittest,email]"]
    tokenizer = [*corpus, "vocab_size=600", "num_sentinels=100", f"out={folder / 'tokenizer'}"]
    assert main(["tokenizer", *tokenizer]) == 0
    words = [*corpus, f"tokenizer={folder / 'tokenizer'}", f"out={folder / 'store'}", "held_out_fraction=0.2"]
    assert main(["prepare", *words]) == 0
    return folder / "store"


def test_a_short_run_is_continued_with_long_inputs(store: Path, tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    model = [
        "model.preset=tiny",
        "model.d_model=32",
        "model.d_ff=64",
        "model.num_layers=1",
        "model.num_decoder_layers=1",
    ]
    rows = ["training.steps=1", "training.global_batch_rows=2", "training.micro_batch_rows=2"]
    assert main(["pretrain", "c4-base-16h", f"run_dir={short}", f"data.store={store}", *SMALL, *model, *rows]) == 0
    words = ["pretrain", "c4-long-16k", f"run_dir={long}", f"data.store={store}", *SMALL]
    words += [f"model.init_from={short}", "training.global_batch_rows=1"]
    assert main([*words, "training.steps=1"]) == 0

    (step,) = [metrics for metrics in read_metrics(long) if metrics["split"] == "train"]
    assert 15_000 < step["tokens"] <= 16_384
    before, after = (list_checkpoints(path / "checkpoints")[-1] for path in (short, long))
    config = read_state(after)["model_config"]
    assert (config["dt_min"], config["dt_max"], config["local_radius"]) == (1e-4, 0.1, 31)
    old, new = read_weights(before)[LOG_DT].exp(), read_weights(after)[LOG_DT].exp()
    place = (old.log10() + 3) / 2
    torch.testing.assert_close(new.log10(), -4 + 3 * place, rtol=1e-5, atol=1e-5)
    # and it goes on from its own checkpoint, not from the short run's again
    assert main([*words, "training.steps=2", "--allow-change", "training.steps"]) == 0
    assert [metrics["step"] for metrics in read_metrics(long) if metrics["split"] == "train"] == [1, 2]
    assert torch.equal(read_weights(list_checkpoints(long / "checkpoints")[-1])[LOG_DT], read_weights(after)[LOG_DT])


def test_nothing_else_of_a_continued_model_changes(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "c4-long-16k", f"run_dir={tmp_path / 'run'}", f"data.store={store}", *SMALL]
    assert main([*words, "model.init_from=nowhere", "model.local_radius=63"]) == 2
    assert "model.local_radius: cannot be changed together with init_from" in capsys.readouterr().err

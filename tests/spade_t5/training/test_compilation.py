"""`training.compile`: layers compiled one by one train as they did, whatever documents a batch holds, and keep their names."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from spade_t5.checkpoint import list_checkpoints, read_weights
from spade_t5.errors import ConfigError
from spade_t5.testing import documented
from spade_t5.testing.trainers import tiny_trainer, train_metrics
from spade_t5.training import engine
from spade_t5.training.compilation import compile_blocks
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def assert_trains_alike(run_dir: Path, other: Path) -> None:
    for key in ("loss", "grad_norm"):
        assert train_metrics(run_dir, key) == pytest.approx(train_metrics(other, key), rel=1e-5)
    weights, expected = (read_weights(list_checkpoints(path / "checkpoints")[-1]) for path in (run_dir, other))
    assert weights.keys() == expected.keys()
    assert not any("_orig_mod" in name for name in weights)


def test_training_is_the_same_up_to_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # traced and differentiated as for inductor, but run as it was traced
    monkeypatch.setattr(engine, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    settings: dict[str, Any] = {"model": {"num_layers": 2}, "ema_decay": 0.9}
    tiny_trainer(tmp_path / "plain", **settings).fit()
    settings |= {"deepspeed": DeepSpeedConfig(zero_stage=2), "compile": True, "save_every_steps": 2}
    tiny_trainer(tmp_path / "compiled", **settings).fit()
    assert_trains_alike(tmp_path / "compiled", tmp_path / "plain")
    assert counters["stats"]["unique_graphs"] > 0
    resumed = tiny_trainer(tmp_path / "resumed", gradient_checkpointing="full", **settings)
    resumed.resume(tmp_path / "compiled" / "checkpoints" / "step-00000002")
    resumed.fit()
    assert train_metrics(tmp_path / "resumed", "loss") == pytest.approx(
        train_metrics(tmp_path / "compiled", "loss")[2:], rel=1e-6
    )


def test_layers_share_graphs_and_documents_do_not_make_new_ones() -> None:
    from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 4, "num_decoder_layers": 4}
    model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("tiny", vocab_size=50, **sizes)).train()
    compile_blocks(model, backend="aot_eager")

    def graphs_after(num_documents: int) -> int:
        segments = torch.arange(48)[None] * num_documents // 48 + 1
        ids = torch.randint(2, 50, (1, 48))
        model(ids, labels=ids[:, ::2], segment_ids=segments, decoder_segment_ids=segments[:, ::2]).loss.backward()
        return counters["stats"]["unique_graphs"]

    assert graphs_after(1) == graphs_after(2) == graphs_after(5)


@pytest.mark.faults
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
def test_inductor_on_a_cpu(tmp_path: Path) -> None:
    settings = {"model": {"global_layers": [], "num_layers": 1}, "steps": 2}
    tiny_trainer(tmp_path / "plain", **settings).fit()
    tiny_trainer(tmp_path / "compiled", compile=True, **settings).fit()
    assert_trains_alike(tmp_path / "compiled", tmp_path / "plain")


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"steps": 1, "global_batch_rows": 1, "micro_batch_rows": 1, "compile": True}
    with pytest.raises(ValueError, match="compile: ZeRO 3 gathers parameters in the middle of each layer"):
        TrainingConfig(deepspeed=DeepSpeedConfig(zero_stage=3), **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compile: compiled layers choose themselves"):
        TrainingConfig(gradient_checkpointing="selective", **sizes)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"training\.compile: on a CPU this needs a C\+\+ compiler") as caught:
        tiny_trainer(tmp_path / "run", compile=True)
    documented(str(caught.value))

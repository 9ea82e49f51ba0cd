"""Changes that a resumed run makes on request are made: it trains on, with the new value in its config and its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.checkpoint import read_state
from spade_t5.config import read_yaml
from spade_t5.launch.cli import main
from spade_t5.training.reporting import read_metrics

CHANGES = {
    "training.global_batch_rows=8": "training.global_batch_rows",
    "training.optimizer={name: adamw, learning_rate: 1.0e-3, beta2: 0.9, weight_decay: 0.1}": "training.optimizer",
    "training.schedule={name: constant}": "training.schedule",
    "training.ssm_learning_rate=1.0e-4": "training.ssm_learning_rate",
    "training.clip_norm=0": "training.clip_norm",
    "training.ema_decay=0.9": "training.ema_decay",
    "loss.z_loss=0.1": "loss",
    "model.dropout_rate=0.1": "model.dropout_rate",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_request(
    change: str, run: Path, tmp_path: Path, pretrain_words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    words = [*pretrain_words(copy, change, "training.steps=8"), "--allow-change", "training.steps"]
    assert main(words) == 2
    assert f"--allow-change {CHANGES[change]}" in capsys.readouterr().err
    assert main([*words, "--allow-change", CHANGES[change]]) == 0
    config, before = read_yaml(copy / "config.yaml"), read_yaml(run / "config.yaml")
    section = CHANGES[change].partition(".")[0]
    assert config[section] != before[section]
    state = read_state(copy / "checkpoints" / "step-00000008")
    assert json.loads(json.dumps(state["config"])) == config
    assert [metrics["step"] for metrics in read_metrics(copy) if metrics["split"] == "train"] == list(range(1, 9))
    # and the change is made once: the same command goes on without the word
    assert main(words) == 0

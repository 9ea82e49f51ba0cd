"""ZeRO 3 with a second copy of the parameters in each group of ranks, and with parameters in host memory: four ranks as two nodes of two."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from spade_t5.testing.ranks import call_on_ranks
from spade_t5.testing.runs import assert_same_tensors
from spade_t5.testing.trainers import tiny_trainer, train_metrics
from spade_t5.training import distributed
from spade_t5.training.config import DeepSpeedConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hpz": {"hpz_partition_size": 2},
    "offloaded": {"offload_parameters": True, "offload_optimizer": True},
}


def train_and_go_on(folder: str) -> dict[str, Any]:
    """Three steps of every variant; then step 3 from the plain run's checkpoint, and its held-out loss after going back to it."""
    import deepspeed.runtime.zero.partition_parameters as zero
    import torch.distributed as dist

    gathered: Counter[int] = Counter()
    gather = zero._dist_allgather_fn

    def counted(shard: Any, whole: Any, group: Any = None) -> Any:
        gathered[dist.get_world_size(group)] += 1
        return gather(shard, whole, group)

    zero._dist_allgather_fn = counted
    found: dict[str, Any] = {}
    for name, options in VARIANTS.items():
        settings: dict[str, Any] = {
            "model": {"dropout_rate": 0.1},
            "steps": 3,
            "ema_decay": 0.9,
            "save_every_steps": 2,
            "keep_checkpoints": 9,
            "deepspeed": DeepSpeedConfig(zero_stage=3, persistence_threshold_numel=20, **options),
        }
        gathered.clear()
        trainer = tiny_trainer(Path(folder) / name, **settings)
        trainer.fit()
        groups = dict(gathered)
        # its ranks still hold copies of the last weights, which must not be taken for those of the checkpoint
        checkpoint = Path(folder) / "plain" / "checkpoints" / "step-00000002"
        trainer.resume(checkpoint)
        trainer._watchdog = None  # that of a run, which is over
        back = trainer.evaluate().loss
        resumed = tiny_trainer(Path(folder) / f"{name}-resumed", **settings)
        resumed.resume(checkpoint)
        fresh = resumed.evaluate().loss
        resumed.fit()
        found[name] = {"gathered": groups, "back": back, "fresh": fresh}
    distributed.shutdown()
    return found


def test_the_same_training_whoever_holds_the_parameters(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    found = call_on_ranks(train_and_go_on, {"folder": str(runs)}, num_ranks=4, log_dir=tmp_path / "logs")[0]
    assert set(found["plain"]["gathered"]) == {"4"}
    groups = found["hpz"]["gathered"]
    assert groups["2"] > groups["4"], "the backward pass gathers within groups of two"
    for name in VARIANTS:
        assert found[name]["back"] == found[name]["fresh"] == found["plain"]["fresh"]
    for key in ("loss", "grad_norm"):
        expected = train_metrics(runs / "plain", key)
        assert train_metrics(runs / "hpz", key) == expected
        assert train_metrics(runs / "hpz-resumed", key) == train_metrics(runs / "plain-resumed", key) == expected[2:]
    checkpoint = Path("checkpoints") / "step-00000003"
    for name in ("hpz", "hpz-resumed"):
        assert_same_tensors(runs / name / checkpoint, runs / "plain" / checkpoint)
    # its norms are summed in another order
    for run in ("offloaded", "offloaded-resumed"):
        losses = train_metrics(runs / run, "loss")
        assert losses == pytest.approx(train_metrics(runs / "plain", "loss")[-len(losses) :], rel=1e-5)

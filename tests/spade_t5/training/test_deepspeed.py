"""DeepSpeed: its configuration, its launchers, what it must not compile or round, and checkpoints that leave it.

Two processes on the CPU each, also where GPUs are present.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spade_t5.checkpoint import list_checkpoints, read_weights
from spade_t5.errors import ConfigError
from spade_t5.launch.cli import main
from spade_t5.pretrain.corpora import PydocsCorpus
from spade_t5.pretrain.prepare import PrepareConfig, prepare
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer
from spade_t5.testing import documented, free_port, run_command, torchrun
from spade_t5.training import distributed
from spade_t5.training.config import DeepSpeedConfig, TrainingConfig
from spade_t5.training.deepspeed import _count_fetches, deepspeed_json
from spade_t5.training.optimizers import SGDConfig
from spade_t5.training.reporting import read_metrics
from spade_t5.training.timing import HostClock

CPU = {"CUDA_VISIBLE_DEVICES": ""}
SETTINGS = [
    "model.num_layers=1",
    "model.num_decoder_layers=1",
    "model.d_model=32",
    "model.d_ff=64",
    "objective.inputs_length=64",
    "data.max_eval_rows=3",
    "training.steps=3",
    "training.global_batch_rows=5",
    "training.micro_batch_rows=1",
    "training.optimizer={name: adamw, learning_rate: 4.0e-3, epsilon: 1.0e-6}",
    "training.schedule={name: constant}",
]


def settings(**values: Any) -> TrainingConfig:
    return TrainingConfig(
        **{
            "steps": 1,
            "global_batch_rows": 10,
            "micro_batch_rows": 2,
            "optimizer": SGDConfig(learning_rate=1.0),
            **values,
        }
    )


def test_a_fetch_of_parameters_is_a_wait() -> None:
    class Coordinator:
        def fetch_sub_module(self, module: str, forward: bool) -> tuple[str, bool, str]:
            return module, forward, clock.part

    clock = HostClock()
    coordinator = Coordinator()
    _count_fetches(coordinator)
    with distributed.collectives_in(clock.waiting):
        for part in ("forward", "evaluation"):
            with clock.within(part):  # type: ignore[arg-type]
                expected = "communication" if part == "forward" else part
                assert coordinator.fetch_sub_module("layer", forward=True) == ("layer", True, expected)
                assert clock.part == part


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_json_batch_sizes_agree(world_size: int) -> None:
    zero = DeepSpeedConfig(zero_stage=2)
    result = deepspeed_json(settings(deepspeed=zero), zero, world_size)
    assert result["train_micro_batch_size_per_gpu"] == 2
    assert result["gradient_accumulation_steps"] == {1: 5, 2: 3, 3: 2}[world_size]
    product = result["train_micro_batch_size_per_gpu"] * result["gradient_accumulation_steps"] * world_size
    assert result["train_batch_size"] == product


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
def test_json_stages_and_precisions(stage: int, precision: str) -> None:
    zero = DeepSpeedConfig(zero_stage=stage, bucket_numel=7, persistence_threshold_numel=5)  # type: ignore[arg-type]
    if (stage, precision) == (0, "bf16"):
        with pytest.raises(ValueError, match="bf16 keeps fp32 master weights in DeepSpeed's ZeRO 1-3"):
            settings(deepspeed=zero, precision=precision)
        return
    result = deepspeed_json(settings(deepspeed=zero, precision=precision, clip_norm=0.5), zero, 2)
    assert result["zero_optimization"] == {
        "stage": stage,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 7,
        "stage3_param_persistence_threshold": 5,
    }
    assert result["gradient_clipping"] == (0.5 if stage else 0.0)  # stage 0 clips in the backend
    assert result.get("bf16") == ({"enabled": True} if precision == "bf16" else None)
    autocast = {"enabled": True, "dtype": "bfloat16"} if precision == "bf16_autocast" else None
    assert result.get("torch_autocast") == autocast
    assert result.get("data_types") == ({"grad_accum_dtype": "fp32"} if precision == "bf16" else None)


def test_json_offload() -> None:
    zero = DeepSpeedConfig(zero_stage=1, offload_optimizer=True)
    result = deepspeed_json(settings(deepspeed=zero), zero, 1)
    assert result["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    with pytest.raises(ValueError, match="offload_optimizer: needs zero_stage 1, 2 or 3"):
        DeepSpeedConfig(zero_stage=0, offload_optimizer=True)
    zero = DeepSpeedConfig(zero_stage=3, offload_parameters=True)
    result = deepspeed_json(settings(deepspeed=zero), zero, 1)
    assert result["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    with pytest.raises(ValueError, match="offload_parameters: needs zero_stage 3"):
        DeepSpeedConfig(zero_stage=2, offload_parameters=True)


def test_json_hierarchical_partitioning() -> None:
    zero = DeepSpeedConfig(zero_stage=3, hpz_partition_size=2)
    assert deepspeed_json(settings(deepspeed=zero), zero, 4)["zero_optimization"]["zero_hpz_partition_size"] == 2
    with pytest.raises(ConfigError, match="hpz_partition_size: 2 does not divide the 3 ranks") as caught:
        deepspeed_json(settings(deepspeed=zero), zero, 3)
    documented(str(caught.value))
    for values, message in (
        ({"zero_stage": 2}, "hpz_partition_size: 2 needs zero_stage 3"),
        ({"zero_stage": 3, "offload_parameters": True}, "hpz_partition_size: a second copy in each node and offload"),
        ({"zero_stage": 3, "hpz_partition_size": 0}, "hpz_partition_size: 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepSpeedConfig(**{"hpz_partition_size": 2, **values})


def test_a_group_of_another_size_than_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="2 processes were launched but the process group has 1"):
            distributed.check_world_size()
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    """Keeps this process on the CPU too: its losses are compared with those of two ranks there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    corpus = PydocsCorpus(packages=("json", "logging", "argparse", "textwrap"))
    tokenizer = train_tokenizer(
        TokenizerConfig(corpus=corpus, out=folder / "tokenizer", vocab_size=600, num_sentinels=40)
    )
    return prepare(PrepareConfig(corpus=corpus, tokenizer=str(tokenizer), out=folder / "store", num_processes=1))


def words(store: Path, run_dir: Path, zero_stage: int | None, *more: str) -> list[str]:
    deepspeed = "null" if zero_stage is None else f"{{zero_stage: {zero_stage}, persistence_threshold_numel: 50}}"
    chosen = [f"run_dir={run_dir}", f"data.store={store}", f"training.deepspeed={deepspeed}"]
    return ["pretrain", "demo", *SETTINGS, *chosen, *more]


def losses(run_dir: Path) -> list[float]:
    return [metrics["loss"] for metrics in read_metrics(run_dir) if metrics["split"] == "train"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Five steps of one process without DeepSpeed."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    assert (
        main(
            words(
                store, run_dir, None, "training.steps=5", "training.save_every_steps=1", "training.keep_checkpoints=5"
            )
        )
        == 0
    )
    return run_dir


def assert_equals(run_dir: Path, reference: Path, steps: Sequence[int]) -> None:
    """Losses and last weights to 1e-5."""
    assert losses(run_dir) == pytest.approx([losses(reference)[step - 1] for step in steps], rel=1e-5)
    last = list_checkpoints(run_dir / "checkpoints")[-1]
    weights, expected = read_weights(last), read_weights(reference / "checkpoints" / last.name)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_two_ranks_of_zero_3_without_a_compiler_then_one_process_without_deepspeed(
    store: Path, single: Path, tmp_path: Path
) -> None:
    empty, extensions = tmp_path / "no-programs", tmp_path / "extensions"
    empty.mkdir()
    # Whoever builds an extension would wait for ever for what a killed build has left; nothing is built.
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    env = {**CPU, "PATH": str(empty), "CC": "", "CXX": "", "TORCH_EXTENSIONS_DIR": str(extensions)}
    done = torchrun(["-m", "spade_t5.launch", *words(store, tmp_path / "zero", 3)], num_ranks=2, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == str(tmp_path / "zero")
    assert [path for path in extensions.rglob("*") if path.is_file()] == [lock]
    assert_equals(tmp_path / "zero", single, [1, 2, 3])
    assert {path.name for path in (tmp_path / "zero" / "checkpoints" / "step-00000003").glob("rank-*")} == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }
    resume = ["training.steps=5", "--resume", str(tmp_path / "zero")]
    assert main(words(store, tmp_path / "alone", None, *resume)) == 0
    assert_equals(tmp_path / "alone", single, [4, 5])


def test_accelerate_launch_starts_the_same_run(store: Path, single: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "-m", "spade_t5.launch"]
    done = run_command([*launcher, *words(store, tmp_path / "run", 2)], env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equals(tmp_path / "run", single, [1, 2, 3])


def test_one_process_without_a_launcher(store: Path, single: Path, tmp_path: Path) -> None:
    done = run_command([sys.executable, "-m", "spade_t5.launch", *words(store, tmp_path / "run", 1)], env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equals(tmp_path / "run", single, [1, 2, 3])


def test_losses_of_groups_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("loss_groups_worker.py"))
    done = run_command([sys.executable, worker, str(tmp_path / "alone")], env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    done = torchrun([worker, str(tmp_path / "ranks")], num_ranks=2, env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = read_metrics(tmp_path / "alone")
    assert [metrics["split"] for metrics in expected] == ["train"] * 3 + ["validation"]
    for metrics, other in zip(read_metrics(tmp_path / "ranks"), expected, strict=True):
        assert set(metrics["loss_by"]["kind"]) == {"even", "odd"}
        assert set(metrics["loss_by"]["third"]) == {"no", "yes"}
        for axis in ("kind", "third"):
            assert metrics["loss_by"][axis] == pytest.approx(other["loss_by"][axis], rel=1e-5)


def test_bf16_does_not_round_the_frozen_state_space_layer(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("bf16_worker.py"))
    done = torchrun([worker, str(tmp_path)], num_ranks=2, env=CPU)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["stage"] for result in results] == [1, 2, 3]
    for result in results:
        assert result["exact"] == [True] * 6  # three steps of two micro-batches
        assert result["others"] == ["torch.bfloat16"]
        assert "A" in result["names"]
        checkpoint = list_checkpoints(tmp_path / f"stage-{result['stage']}" / "checkpoints")[-1]
        assert all(tensor.dtype == torch.float32 for tensor in read_weights(checkpoint).values())

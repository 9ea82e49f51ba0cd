"""Small pretraining runs for tests to break, and what it means that two runs are the same."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from spade_t5.checkpoint import list_checkpoints, read_state
from spade_t5.training.reporting import METRICS_FILE, read_metrics

Settings = Mapping[str, Any]


class StepFacts(NamedTuple):
    """What a training step must repeat bit for bit; real numbers as `float.hex` writes them."""

    loss: str
    grad_norm: str
    lr: str
    samples: str
    """Digest of the numbers of the samples of all ranks."""
    targets: int
    tokens: int


def write_recipe(path: Path, stores: Iterable[Path], *, model: Settings = {}, **training: Any) -> Path:  # noqa: B006 - read only
    """A recipe for `spade-t5 pretrain` on a mixture of the stores: `tiny`, made narrow, with everything that a run can have switched on.

    Args:
        path: YAML file to write.
        stores: folders of token stores.
        model: fields put over those of the model.
        training: fields put over those of `training`.
    """
    recipe = {
        "run_dir": "to be given",
        "model": {"preset": "tiny", "d_model": 64, "d_ff": 128, "dropout_rate": 0.1, **model},
        "data": {
            "mixture": [
                {"store": str(store), "rate": rate} for store, rate in zip(stores, (3.0, 1.0, 1.0), strict=False)
            ],
            "packing": "best_fit",
            "max_eval_rows": 4,
        },
        "objective": {"name": "span_corruption", "inputs_length": 64},
        "training": {
            "steps": 16,
            "global_batch_rows": 8,
            "micro_batch_rows": 2,
            "optimizer": {"name": "adamw", "learning_rate": 2.0e-3},
            "schedule": {"name": "cosine", "warmup_steps": 4, "final_factor": 0.1},
            "clip_norm": 0.5,
            "ema_decay": 0.9,
            "precision": "fp32",
            "deepspeed": {"zero_stage": 1, "persistence_threshold_numel": 5000},
            "loader_workers": 2,
            "save_every_steps": 4,
            **training,
        },
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def attempts(run_dir: Path) -> list[tuple[int, StepFacts]]:
    """The training steps of every attempt, in the order in which they were made, so that a step that was redone comes several times.

    A line that a kill has torn is left out.
    """
    steps = []
    for line in _lines(run_dir / METRICS_FILE):
        if line.get("split") == "train":
            steps.append((line["step"], _facts(line)))
    return steps


def lineage(run_dir: Path) -> dict[int, StepFacts]:
    """The steps that made the weights: of each step the last attempt."""
    return {line["step"]: _facts(line) for line in read_metrics(run_dir) if line["split"] == "train"}


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """Weights, moments and averages of a checkpoint, whole, by "<state>/<parameter>", and what does not train by "frozen/<name>".

    They do not depend on the ranks that saved them.
    """
    state = read_state(path)
    tensors: dict[str, Tensor] = {}
    for key, names in state["index"].items():
        for name, pieces in names.items():
            whole = torch.empty(sum(numel for _, _, numel in pieces))
            for file, offset, numel in pieces:
                whole[offset : offset + numel] = _read(path / file, f"{key}/{name}")
            tensors[f"{key}/{name}"] = whole
    for key, files in state["whole"].items():
        for name, file in files.items():
            tensors[f"{key}/{name}"] = _read(path / file, f"{key}/{name}")
    with safe_open(path / "frozen.safetensors", framework="pt") as reader:
        tensors |= {f"frozen/{name}": reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
    return tensors


def assert_same_tensors(checkpoint: Path, expected: Path, *, only: Iterable[str] | None = None) -> None:
    """Asserts that two checkpoints have the same tensors, bit for bit, the same counters and the same place in the data.

    Args:
        checkpoint: the one under test.
        expected: the one it must equal.
        only: states to compare, such as weight; None: all, which must be the same ones.
    """
    tensors, expected_tensors = checkpoint_tensors(checkpoint), checkpoint_tensors(expected)
    if only is not None:
        expected_tensors = {key: value for key, value in expected_tensors.items() if key.split("/")[0] in set(only)}
        tensors = {key: tensors[key] for key in expected_tensors}
    assert tensors.keys() == expected_tensors.keys()
    different = [key for key, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[key])]
    assert not different, f"{checkpoint} and {expected} differ in {different[:5]} and {len(different)} tensors in all"
    state, expected_state = read_state(checkpoint), read_state(expected)
    for key in ("step", "tokens", "cursor", "scalars"):
        assert state[key] == expected_state[key], key


def assert_exact(run_dir: Path, expected: Path, *, after_step: int = 0) -> None:
    """Asserts that a run was as good as never disturbed: the same steps, every attempt of a step alike, the same last checkpoint.

    Args:
        run_dir: folder of the run under test.
        expected: folder of an undisturbed run.
        after_step: the run began from a checkpoint of this step, which another run had made.
    """
    steps = lineage(run_dir)
    expected_steps = {step: facts for step, facts in lineage(expected).items() if step > after_step}
    assert steps.keys() == expected_steps.keys()
    different = [step for step in steps if steps[step] != expected_steps[step]]
    assert not different, f"step {different[0]}: {steps[different[0]]}, undisturbed {expected_steps[different[0]]}"
    redone = [(step, facts) for step, facts in attempts(run_dir) if facts != expected_steps[step]]
    assert not redone, f"an attempt of step {redone[0][0]}: {redone[0][1]}, undisturbed {expected_steps[redone[0][0]]}"
    last, expected_last = (list_checkpoints(folder / "checkpoints")[-1] for folder in (run_dir, expected))
    assert last.name == expected_last.name
    assert_same_tensors(last, expected_last)


def _facts(line: Mapping[str, Any]) -> StepFacts:
    return StepFacts(
        loss=float(line["loss"]).hex(),
        grad_norm=float(line["grad_norm"]).hex(),
        lr=float(line["lr"]).hex(),
        samples=line["samples"],
        targets=line["targets"],
        tokens=line["tokens"],
    )


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as reader:
        return reader.get_tensor(key)

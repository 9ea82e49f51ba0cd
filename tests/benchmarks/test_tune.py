"""Tuning of launch configurations, with the interpreter for a GPU and a made-up cost for its time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spade_t5.benchmarks.kernels import tune
from spade_t5.benchmarks.kernels.cases import Workload
from spade_t5.errors import ConfigError
from spade_t5.kernels import launch
from spade_t5.kernels.gated_gelu import gated_gelu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter, which a GPU turns off")

OP = "gated_gelu"
CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the table that the kernels read during the test."""
    path = tmp_path / "launch_configs.json"
    path.write_text(launch.table_path(OP).read_text())
    monkeypatch.setattr(launch, "table_path", lambda op: path)
    launch._lookup.cache_clear()
    yield path
    monkeypatch.undo()
    launch._lookup.cache_clear()


def workload() -> Workload:
    a, b = (x.requires_grad_() for x in torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)))
    gradient = torch.ones(3, 70)
    return Workload(forward=lambda: gated_gelu(a, b, backend="triton"), leaves=(a, b), gradients=(gradient,))


def cost(_: Workload, part: str) -> float:
    """Least for blocks of 256 and 8 warps in the forward pass, for blocks of 16 in the backward pass."""
    config = launch._lookup(OP, {"forward": "fwd", "backward": "bwd"}[part], "interpreter")
    best_block = 256 if part == "forward" else 16
    return 1.0 + abs(math.log2(config["BLOCK"] / best_block)) + abs(math.log2(config["num_warps"] / 8))


def run(table: Path) -> dict[str, dict[str, int]]:
    tune.tune_table(OP, {"small": workload}, device=CPU, gpu="a GPU of this test", seconds_of=cost)
    return json.loads(table.read_text())["configs"]["interpreter"]


def test_goes_down_to_the_fastest_configuration_of_each_kernel(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads(table.read_text())
    tuned = run(table)
    assert tuned["fwd"] == {"BLOCK": 256, "num_warps": 8, "num_stages": 1}
    assert tuned["bwd"] == {"BLOCK": 16, "num_warps": 8, "num_stages": 1}
    after = json.loads(table.read_text())
    assert "interpreter: 2 of 2 variants measured on a GPU of this test" in after["origin"]
    assert after["configs"]["sm_90"] == before["configs"]["sm_90"]
    assert "so not tuned" not in capsys.readouterr().out
    assert launch.launch_config(OP, "fwd", CPU)["BLOCK"] == 256


def test_a_configuration_that_gives_something_else_is_not_taken(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_gives", lambda workload, expected: False)
    before = json.loads(table.read_text())["configs"]
    assert run(table) == before["interpreter"]


def test_results_of_other_configurations_are_compared(table: Path) -> None:
    made = workload()
    outputs = made.outputs()
    results = [*outputs, *made.backward(outputs)]
    assert tune._gives(made, results)
    assert not tune._gives(made, [results[0] * 1.001, *results[1:]])


def test_candidates_stay_in_range() -> None:
    config = {"BLOCK": 16, "num_warps": 16, "num_stages": 1}
    assert tune.candidates(config, "BLOCK") == [{**config, "BLOCK": 32}]
    assert tune.candidates(config, "num_warps") == [{**config, "num_warps": 8}]
    assert tune.candidates(config, "num_stages") == [{**config, "num_stages": 2}]


def test_a_new_architecture_starts_from_the_nearest_older_one(table: Path) -> None:
    before = json.loads(table.read_text())["configs"]
    fast = {"BLOCK": 512, "num_warps": 4, "num_stages": 1}
    tune.write_table(OP, "sm_89", {"fwd": fast}, "another GPU")
    after = json.loads(table.read_text())["configs"]
    assert after == {**before, "sm_89": {"fwd": fast, "bwd": before["sm_80"]["bwd"]}}


def test_tables_keep_their_form() -> None:
    text = launch.table_path(OP).read_text()
    assert tune._dump(json.loads(text)) == text


def test_a_table_that_cannot_be_written(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\); tune in a checkout"):
        tune.write_table(OP, "sm_90", {}, "a GPU")

"""Launch tables: lookup by architecture, and what every shipped table must hold."""

import json
from pathlib import Path

import pytest
import torch

from spade_t5.kernels import launch

TABLES = sorted(Path(launch.__file__).parent.glob("*/launch_configs.json"))


def test_interpreter_and_unknown_architectures_find_their_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = json.loads(launch.table_path("gated_gelu").read_text(encoding="utf-8"))["configs"]
    for architecture, expected in (("sm_90", "sm_90"), ("sm_120", "sm_90"), ("sm_86", "sm_80"), ("sm_70", "sm_80")):
        monkeypatch.setattr(launch, "architecture", lambda device, name=architecture: name)
        assert launch.launch_config("gated_gelu", "fwd", torch.device("cpu")) == configs[expected]["fwd"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_every_architecture_has_every_variant(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["origin"]
    assert set(table["configs"]) >= {"sm_80", "sm_90", "interpreter"}
    assert len({frozenset(variants) for variants in table["configs"].values()}) == 1
    for variants in table["configs"].values():
        launches = [config for name, config in variants.items() if not name.startswith("chunk/")]
        assert all({"num_warps", "num_stages"} <= set(config) for config in launches)

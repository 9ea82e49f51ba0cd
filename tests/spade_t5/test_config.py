"""Config files: precedence, types, and one readable line for each mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from spade_t5.config import apply_overrides, dump_yaml, from_mapping, merge, read_yaml, to_mapping
from spade_t5.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    name: ClassVar[str] = "slow"
    seconds: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fast:
    name: ClassVar[str] = "fast"
    gears: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    metres: int = 1

    def __post_init__(self) -> None:
        if self.metres < 0:
            raise ValueError(f"metres: {self.metres} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    steps: int
    folder: Path = Path("runs")
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    way: float | tuple[Stretch, ...] = 0.0
    speed: Slow | Fast = field(default_factory=Slow)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} must not be negative")


def test_round_trip() -> None:
    tree = from_mapping(Tree, {"steps": 3, "speed": {"name": "fast", "gears": [4]}, "limit": 7, "folder": "x"})
    assert tree == Tree(steps=3, speed=Fast(gears=(4,)), limit=7, folder=Path("x"))
    assert from_mapping(Tree, to_mapping(tree)) == tree


def test_files_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("steps: 1\nspeed: {name: slow, seconds: 2}\n")
    (tmp_path / "run.yaml").write_text("defaults: [base.yaml]\nsteps: 2\n")
    mapping = apply_overrides(read_yaml(tmp_path / "run.yaml"), ["speed.seconds=1e-3", "mode=b"])
    assert from_mapping(Tree, mapping) == Tree(steps=2, mode="b", speed=Slow(seconds=1e-3))
    assert from_mapping(Tree, read_yaml(_written(tmp_path, dump_yaml(mapping)))) == from_mapping(Tree, mapping)


def test_another_variant_replaces_the_whole_section() -> None:
    below = {"speed": {"name": "slow", "seconds": 2.0}}
    assert merge(below, {"speed": {"name": "fast"}})["speed"] == {"name": "fast"}
    assert merge(below, {"speed": {"seconds": 3.0}})["speed"] == {"name": "slow", "seconds": 3.0}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"step": 1}, "run.step: unknown config key; did you mean 'run.steps'?"),
        ({"steps": "three"}, "run.steps: 'three' is a str, expected int"),
        ({"steps": True}, "run.steps: True is a bool, expected int"),
        ({"steps": 1.5}, "run.steps: 1.5 is a float, expected int"),
        ({"steps": -1}, "run.steps: -1 must not be negative"),
        ({}, "run.steps: required and not given; set it in the config file or as run.steps=..."),
        ({"steps": 1, "mode": "c"}, "run.mode: 'c' is not one of 'a', 'b'"),
        ({"steps": 1, "speed": {"name": "warp"}}, "run.speed.name: 'warp' is not one of fast, slow"),
        ({"steps": 1, "speed": {"name": "fast", "gears": ["x"]}}, "run.speed.gears[0]: 'x' is a str, expected int"),
        ({"steps": 1, "speed": {"name": "fast", "gears": 3}}, "run.speed.gears: 3 is not a list"),
        (
            {"steps": 1, "way": [{"meters": 1}]},
            "run.way[0].meters: unknown config key; did you mean 'run.way[0].metres'?",
        ),
        ({"steps": 1, "way": [{}, {"metres": -1}]}, "run.way[1].metres: -1 must not be negative"),
        (
            {"steps": 1, "speed": {"name": "slow", "seconds": 10**400}},
            "run.speed.seconds: an integer of 1329 bits is too large, at most 63 are allowed",
        ),
        ({"steps": 1, "way": [3.0]}, "run.way[0]: 3.0 is not a mapping of keys to values"),
        (
            {"steps": 1, "way": "far"},
            "run.way: 'far' is a str, expected float or tuple",
        ),
        ([1], "run: [1] is not a mapping of keys to values"),
    ],
)
def test_mistakes_are_named(mapping: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Tree, mapping, "run")
    assert str(caught.value) == message


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml: No such file or directory; give the path"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(_written(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_yaml(_written(tmp_path, "- 1"))
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_overrides({}, ["steps"])


def _written(folder: Path, text: str) -> Path:
    path = folder / "written.yaml"
    path.write_text(text)
    return path

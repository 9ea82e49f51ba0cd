"""Imports point one way: kernels <- spade_t5 <- pretrain, finetune <- benchmarks <- launch; heavy optional packages have one door each."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "spade_t5", "pretrain", "finetune", "benchmarks", "launch")
ALLOWED = {
    "kernels": {"kernels"},
    "spade_t5": {"kernels", "spade_t5"},
    "pretrain": {"kernels", "spade_t5", "pretrain"},
    "finetune": {"kernels", "spade_t5", "finetune"},
    "benchmarks": {"kernels", "spade_t5", "pretrain", "finetune", "benchmarks"},
    "launch": set(FLOORS),
}
NO_TRANSFORMERS = ("spade_t5/layers", "spade_t5/training", "spade_t5/checkpoint", "spade_t5/ops.py")


def source_files(floor: str) -> list[Path]:
    """Python files of a floor; the links inside spade_t5/ belong to the other floors."""
    links = {path for path in (ROOT / "spade_t5").iterdir() if path.is_symlink()}
    return [path for path in sorted((ROOT / floor).rglob("*.py")) if not links & set(path.parents)]


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> str | None:
    """The floor a module name belongs to, None for foreign packages."""
    parts = module.split(".")
    if parts[0] != "spade_t5":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "spade_t5"


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_one_way(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in source_files(floor)
        for module in imported_modules(path)
        if (target := floor_of(module)) is not None and target not in ALLOWED[floor]
    ]
    assert not wrong


@pytest.mark.parametrize("floor", FLOORS)
def test_no_bare_top_level_names(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in source_files(floor)
        for module in imported_modules(path)
        if module.split(".")[0] in set(FLOORS) - {"spade_t5"}
    ]
    assert not wrong


def test_kernels_know_nothing_of_ours() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in source_files("kernels")
        for module in imported_modules(path)
        if module.startswith("spade_t5") and not module.startswith("spade_t5.kernels")
    ]
    assert not wrong


def test_one_door_per_heavy_dependency() -> None:
    doors = {
        "deepspeed": {"spade_t5/training/deepspeed.py"},
        "triton": {"kernels", "spade_t5/testing/compile_kernels.py"},
        "datasets": {"pretrain", "finetune", "spade_t5/data"},
    }
    for package, allowed in doors.items():
        wrong = [
            str(path.relative_to(ROOT))
            for floor in FLOORS
            for path in source_files(floor)
            if package in {module.split(".")[0] for module in imported_modules(path)}
            and not any(str(path.relative_to(ROOT)).startswith(door) for door in allowed)
        ]
        assert not wrong, f"{package} is imported by {wrong}"


def test_layers_ops_and_engine_do_not_need_transformers() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in source_files("spade_t5")
        if str(path.relative_to(ROOT)).startswith(NO_TRANSFORMERS)
        and "transformers" in {module.split(".")[0] for module in imported_modules(path)}
    ]
    assert not wrong


def test_only_the_launcher_and_named_files_read_the_environment() -> None:
    allowed = ("launch", "spade_t5/ops.py", "spade_t5/training", "spade_t5/testing", "kernels")
    wrong = [
        str(path.relative_to(ROOT))
        for floor in FLOORS
        for path in source_files(floor)
        if not str(path.relative_to(ROOT)).startswith(allowed) and "environ" in path.read_text(encoding="utf-8")
    ]
    assert not wrong


def test_nothing_unpickles_or_runs_remote_code() -> None:
    forbidden = (
        "torch.load(",
        "pickle.load",
        "trust_remote_code=True",
        "yaml.load(",
        "shell=True",
        "allow_pickle=True",
    )
    wrong = [
        f"{path.relative_to(ROOT)}: {word}"
        for floor in FLOORS
        for path in source_files(floor)
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    assert not wrong

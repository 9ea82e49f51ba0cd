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


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.package.PackageImporter",
    "torch.hub.load",
    "torch.jit.load",
    "torch.serialization.add_safe_globals",
    "np.load",
    "numpy.load",
    "np.fromregex",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
    "yaml.FullLoader",
    "pandas.read_pickle",
    "pd.read_pickle",
    "tempfile.mktemp",
    "tarfile.open",
    "zipfile.ZipFile",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
UNSAFE_ARGUMENTS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}
FROM_PRETRAINED = {
    "spade_t5/hf/tokenizer.py": "PreTrainedTokenizerFast, of a folder that was looked at, by name and without remote code",
    "launch/demo.py": "reads back what it has just exported, as the model card tells its readers to",
}
"""Files that load by Hugging Face's own means; all others go through `spade_t5.hf.folders`."""


def uses(source: str) -> Iterator[str]:
    """What a source does that could run what a file of somebody else holds."""
    for node in ast.walk(ast.parse(source)):
        place = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{place}: imports {module}" for module in modules if module.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS - {"compile"}:
            yield f"{place}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) == "compile":
                yield f"{place}: compile"
            for word in node.keywords:
                if word.arg in UNSAFE_ARGUMENTS and not (
                    isinstance(word.value, ast.Constant) and word.value.value is (not UNSAFE_ARGUMENTS[word.arg])
                ):
                    yield f"{place}: {word.arg}={ast.unparse(word.value)}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "f = exec",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "numpy.load(path)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "run(words, shell=True)",
        "load(path, trust_remote_code=flag)",
        "load(path, weights_only=False)",
        "compile(text, 'a', 'exec')",
    ],
)
def test_unsafe_uses_are_seen(source: str) -> None:
    assert list(uses(source))


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_unpickles_evaluates_or_runs_a_shell(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {use}"
        for path in source_files(floor)
        for use in uses(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_models_and_tokenizers_are_loaded_through_one_door() -> None:
    found = {
        str(path.relative_to(ROOT))
        for floor in FLOORS
        for path in source_files(floor)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("from_pretrained", "snapshot_download", "hf_hub_download")
    }
    assert found == {*FROM_PRETRAINED, "spade_t5/hf/folders.py"}

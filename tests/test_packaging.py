"""The package is whole from a wheel, from an editable install and from a bare checkout, and hides no foreign package."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "pretrain", "finetune", "benchmarks", "launch", "configs")


def tracked_files() -> set[str]:
    """Files that git knows below the package's folders, as paths inside the package."""
    done = subprocess.run(
        ["git", "ls-files", "spade_t5", *FLOORS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout: there is no list of files to compare with")
    names = {name for name in done.stdout.splitlines() if not (ROOT / name).is_symlink() and (ROOT / name).exists()}
    return {name if name.startswith("spade_t5/") else f"spade_t5/{name}" for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("spade_t5/")}
    assert held == tracked_files()


def test_wheel_imports_on_its_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import spade_t5, spade_t5.ops, spade_t5.kernels.local_attention, spade_t5.launch.cli;"
        "print(spade_t5.__file__); print(spade_t5.SpadeT5Config.from_preset('tiny').d_model)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    path, d_model = done.stdout.split()
    assert path.startswith(str(tmp_path))
    assert d_model == "128"


def test_bare_checkout_imports_and_hides_nothing() -> None:
    code = (
        "import spade_t5.kernels.local_attention, spade_t5.finetune, importlib.util;"
        "spec = importlib.util.find_spec('kernels');"
        "print(spec.origin if spec and spec.origin else 'namespace')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.startswith(str(ROOT))
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_links_are_relative() -> None:
    for name in FLOORS:
        link = ROOT / "spade_t5" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"

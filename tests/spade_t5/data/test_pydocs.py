import sys
import sysconfig
from pathlib import Path

import pytest

from spade_t5.data import pydocs
from spade_t5.data.pydocs import PyDoc, read_pydocs, split_of
from spade_t5.errors import DataError

SOURCE = '''"""Module summary line.

    Body of the module,
      indented.
"""
if True:
    class Thing:
        """Things are documented here."""

        async def method(self):
            """A first paragraph that goes on
            in a second line.

            And a body.
            """

        def short(self):
            """Too short."""


def function():
    x = """Not a docstring, whatever it says."""

    def inner():
        r"""Inner functions count \\d too."""
'''


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python installation with a package of its own and one module of the standard library."""
    files = {
        "site/pack/__init__.py": SOURCE,
        "site/pack/sub/broken.py": "def (:\n",
        "site/pack/sub/nul.py": "x = 1\0\n",
        "site/pack/sub/latin.py": b"# -*- coding: latin-1 -*-\n'''A caf\xe9 with twenty letters.'''\n",
        "site/pack/sub/deep.py": "x = " + "-" * 100_000 + "1\n",
        "site/pack/tests/test_it.py": '"""Documentation of a test, left out."""\n',
        "site/other.py": '"""Things are documented here."""\nraise SystemExit("imported")\n',
        "site/not-a-name/mod.py": '"""Cannot be imported by name."""\n',
        "std/json/__init__.py": '"""JavaScript object notation."""\n',
        "std/unknown.py": '"""Not of the standard library."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    folders = {"stdlib": tmp_path / "std", "purelib": tmp_path / "site", "platlib": tmp_path / "site"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]))
    return tmp_path


def test_docstrings_are_found_cleaned_and_split(installation: Path) -> None:
    docs = read_pydocs(("pack",), num_processes=1)
    body = "Body of the module,\n  indented."
    paragraph = "A first paragraph that goes on\nin a second line.\n\nAnd a body."
    assert docs == [
        PyDoc("pack", "pack", "", "Module summary line.", body, "Module summary line.\n\n" + body),
        PyDoc("pack", "pack", "Thing", "Things are documented here.", "", "Things are documented here."),
        PyDoc("pack", "pack", "Thing.method", "", paragraph, paragraph),
        PyDoc("pack", "pack", "function.inner", "Inner functions count \\d too.", "", "Inner functions count \\d too."),
        PyDoc("pack", "pack.sub.latin", "", "A café with twenty letters.", "", "A café with twenty letters."),
    ]


def test_everything_or_the_standard_library_or_named_packages(installation: Path) -> None:
    everything = read_pydocs(num_processes=1)
    assert [doc.package for doc in everything] == ["json", "other", "pack", "pack", "pack", "pack"]
    assert [doc.text for doc in everything].count("Things are documented here.") == 1
    assert [doc.package for doc in read_pydocs(("stdlib",))] == ["json"]
    with pytest.raises(DataError, match="'missing'"):
        read_pydocs(("json", "missing"))


def test_cache_is_used_until_the_sources_change(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = installation / "cache"
    docs = read_pydocs(("pack", "other"), cache_dir=cache)
    assert len(list(cache.iterdir())) == 2

    def no_parsing(task: tuple[str, str, str]) -> list[PyDoc]:
        raise AssertionError(f"{task} is parsed again")

    with monkeypatch.context() as patch:
        patch.setattr(pydocs, "_parse_file", no_parsing)
        assert read_pydocs(("pack", "other"), cache_dir=cache) == docs
    (installation / "site/other.py").write_text('"""Another text of another length."""\n')
    assert read_pydocs(("other",), cache_dir=cache)[0].text == "Another text of another length."


def test_processes_change_nothing(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = read_pydocs(num_processes=1)
    monkeypatch.setattr(pydocs, "_POOL_BYTES", 0)
    assert read_pydocs(num_processes=2) == alone


def test_this_installation_has_documents_in_both_splits() -> None:
    docs = read_pydocs(("json", "email", "logging", "argparse", "typing", "asyncio", "unittest"), num_processes=1)
    assert len(docs) > 400
    assert {split_of(doc.package) for doc in docs} == {"train", "validation"}
    assert all(doc.text == doc.text.strip() and len(doc.text) >= 20 for doc in docs)
    assert sum(bool(doc.summary and doc.body) for doc in docs) > 100
    assert docs == sorted(docs, key=lambda doc: doc.package)


def test_splits_never_change() -> None:
    held_out = [
        name for name in ("numpy", "typing", "torch", "transformers", "json", "asyncio") if split_of(name) != "train"
    ]
    assert held_out == ["numpy", "typing", "json"]
    share = sum(split_of(name) == "validation" for name in sys.stdlib_module_names) / len(sys.stdlib_module_names)
    assert 0.03 < share < 0.2

"""`pydocs`: the built-in corpus, made of documentation that any Python installation holds.

Docstrings of the standard library and of installed packages are gathered from source files: parsed, never imported, so nothing of theirs
runs. Every machine with this project has them, nothing is shipped or downloaded, and they are real English with a structure that
gives tasks: by PEP 257 a docstring is a summary line, a blank line and a body. What two machines gather differs if their packages do.
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from spade_t5.data.processes import worker_pool
from spade_t5.errors import DataError

STANDARD_LIBRARY = "stdlib"

_MIN_CHARACTERS = 20
_POOL_BYTES = 32_000_000  # less is parsed before worker processes have started
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__", "site-packages"}
_FORMAT = 1

Split = Literal["train", "validation"]


class PyDoc(NamedTuple):
    """One docstring."""

    package: str
    """Top-level import name; each module of the standard library counts as a package."""
    module: str
    """Dotted name of the module it stands in."""
    name: str
    """Qualified name of what it documents within the module; empty for the module itself."""
    summary: str
    """Its first line, if by PEP 257 a blank line or nothing follows; else empty."""
    body: str
    """What follows the summary; all of the text if there is none."""
    text: str
    """The whole docstring, its indentation removed."""


def split_of(package: str) -> Split:
    """Which split all docstrings of a package belong to: about one package in ten is held out, by a hash of its name.

    The salt is one for which both the standard library alone and a full installation hold out about a tenth of their text; NumPy, which
    is always there, is held out.
    """
    return "validation" if hashlib.sha256(f"pydocs-10:{package}".encode()).digest()[0] < 26 else "train"


def read_pydocs(
    packages: Sequence[str] = (), *, cache_dir: Path | None = None, num_processes: int | None = None
) -> list[PyDoc]:
    """Docstrings of this Python installation, without repetitions, ordered by package, module and place in the file.

    Docstrings under 20 characters, test folders and files that do not parse are left out.

    Args:
        packages: top-level import names, or `stdlib` for the whole standard library; none means everything installed.
        cache_dir: folder that keeps what was parsed, by package and by the names and sizes of its files; None parses anew.
        num_processes: processes that parse; None is one for each core.

    Raises:
        DataError: a package is not installed as Python source.
    """
    sources = _find_sources()
    wanted = {name for name in packages if name != STANDARD_LIBRARY}
    if not packages or STANDARD_LIBRARY in packages:
        wanted |= {name for name, source in sources.items() if source.is_standard}
    if not packages:
        wanted = set(sources)
    for name in sorted(wanted):
        if name not in sources:
            raise DataError(
                f"pydocs: package {name!r} is not installed as Python source; name installed packages, or {STANDARD_LIBRARY!r}"
            )

    found: dict[str, list[PyDoc]] = {}
    missing: list[str] = []
    for name in sorted(wanted):
        cached = None if cache_dir is None else _read_cache(_cache_file(cache_dir, sources[name]))
        if cached is not None:
            found[name] = cached
        else:
            missing.append(name)
    if missing:
        for name, docs in _parse([sources[name] for name in missing], num_processes).items():
            found[name] = docs
            if cache_dir is not None:
                _write_cache(_cache_file(cache_dir, sources[name]), docs)

    unique: dict[str, PyDoc] = {}
    for name in sorted(found):
        for doc in found[name]:
            unique.setdefault(doc.text, doc)
    return list(unique.values())


class _Source(NamedTuple):
    """The source files of one package, with their module names and sizes."""

    package: str
    is_standard: bool
    files: tuple[tuple[str, str, int], ...]  # path, module, bytes


def _find_sources() -> dict[str, _Source]:
    standard = Path(sysconfig.get_path("stdlib"))
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    sources: dict[str, _Source] = {}
    for root, is_standard in [(standard, True), *((folder, False) for folder in sorted(installed))]:
        for entry in sorted(root.iterdir()) if root.is_dir() else []:
            package = entry.name.removesuffix(".py")
            if not package.isidentifier() or package in _SKIPPED_FOLDERS or package in sources:
                continue
            if is_standard and package not in sys.stdlib_module_names:
                continue
            files = tuple(_source_files(entry, root))
            if files:
                sources[package] = _Source(package, is_standard, files)
    return sources


def _source_files(entry: Path, root: Path) -> Iterator[tuple[str, str, int]]:
    if entry.is_file():
        paths = [entry] if entry.suffix == ".py" else []
    else:
        paths = []
        for folder, folders, names in os.walk(entry):
            folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
            paths += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        yield str(path), ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.stat().st_size


def _parse(sources: Sequence[_Source], num_processes: int | None) -> dict[str, list[PyDoc]]:
    tasks = [(source.package, path, module) for source in sources for path, module, _ in source.files]
    found: dict[str, list[PyDoc]] = {source.package: [] for source in sources}
    processes = num_processes or os.cpu_count() or 1
    if processes == 1 or sum(size for source in sources for _, _, size in source.files) < _POOL_BYTES:
        for task in tasks:
            found[task[0]] += _parse_file(task)
        return found
    with worker_pool(processes) as pool:
        for (package, _, _), docs in zip(tasks, pool.map(_parse_file, tasks, chunksize=16), strict=True):
            found[package] += docs
    return found


def _parse_file(task: tuple[str, str, str]) -> list[PyDoc]:
    """Docstrings of one file in the order of the file; none if it cannot be parsed."""
    package, path, module = task
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(Path(path).read_bytes())
        return list(_docstrings(tree, package, module, ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return []


def _docstrings(node: ast.AST, package: str, module: str, name: str) -> Iterator[PyDoc]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        raw = ast.get_docstring(node, clean=False)
        text = inspect.cleandoc(raw).strip() if raw else ""
        if len(text) >= _MIN_CHARACTERS and _is_encodable(text):
            yield PyDoc(package, module, name, *_summary_and_body(text), text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, package, module, f"{name}.{child.name}".lstrip("."))
        elif isinstance(child, ast.stmt):
            yield from _docstrings(child, package, module, name)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _summary_and_body(text: str) -> tuple[str, str]:
    first, _, rest = text.partition("\n")
    if rest and rest.split("\n", 1)[0].strip():
        return "", text
    return first.strip(), rest.strip("\n")


def _cache_file(cache_dir: Path, source: _Source) -> Path:
    content = json.dumps(
        [_FORMAT, sys.version_info[:2], source.package, [[module, size] for _, module, size in source.files]]
    )
    return cache_dir / f"pydocs-{source.package}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.jsonl"


def _read_cache(path: Path) -> list[PyDoc] | None:
    """What is kept of a package; None if nothing is, or something else stands there."""
    try:
        with path.open(encoding="utf-8") as file:
            docs = [PyDoc(*json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return docs if all(isinstance(value, str) for doc in docs for value in doc) else None


def _write_cache(path: Path, docs: Sequence[PyDoc]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(doc) + "\n" for doc in docs)
    partial.replace(path)

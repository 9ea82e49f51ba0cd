from pathlib import Path

import pytest

from spade_t5.benchmarks.faults import make_stores


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two token stores of real text, to be mixed."""
    return make_stores(tmp_path_factory.mktemp("stores"))

"""Joining the group of ranks where the launcher's variables, or the port, are not as they should be."""

import socket

import pytest

from spade_t5.errors import ConfigError, RunAbortedError
from spade_t5.testing import documented
from spade_t5.training import distributed


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Variables of the main rank of two."""
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=f"^{name}: not set, but WORLD_SIZE is 2; set it") as failure:
        distributed.join()
    documented(str(failure.value))


def test_a_port_that_is_no_number_is_refused(place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(ConfigError, match=r"^MASTER_PORT: 'http' is not a number") as failure:
        distributed.join()
    documented(str(failure.value))


@pytest.mark.parametrize(
    ("is_chosen_by_torchrun", "error", "remedy"),
    [(False, ConfigError, "choose another port"), (True, RunAbortedError, "start again")],
)
def test_a_port_that_another_program_has(
    is_chosen_by_torchrun: bool,
    error: type[Exception],
    remedy: str,
    place: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_chosen_by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "local")
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(error, match=f"cannot be opened .*; {remedy}") as failure:
            distributed.join()
    documented(str(failure.value))

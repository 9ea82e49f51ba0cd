"""Reads the config file of another program key by key, and refuses what has no counterpart here: all of it in one message."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spade_t5.errors import ConfigError
from spade_t5.messages import reason_of, shown

AUTO = "auto"
"""A value that its program would fill in; here the recipe's stays."""

_MAX_FILE_BYTES = 2**18


class Section:
    """A mapping of a foreign file, whose keys are taken one by one. Absent keys, null and "auto" say nothing: they are None."""

    def __init__(self, values: object, path: str = "", refused: list[str] | None = None) -> None:
        """Begins to read.

        Args:
            values: the mapping; anything else is refused.
            path: dotted path of the mapping in the file.
            refused: where refusals are noted; None: in a list of its own.
        """
        self.refused: list[str] = [] if refused is None else refused
        """What cannot be taken over, a key and its remedy each."""
        self._path = path
        self._left: dict[str, Any] = {}
        if isinstance(values, Mapping):
            self._left = {str(key): value for key, value in values.items()}
        elif values is not None:
            self.refused.append(f"{path or 'the file'}: {shown(values)} is not a mapping of keys to values")

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> Any:
        """The value of a key, whatever it is."""
        value = self._left.pop(key, None)
        return None if value == AUTO else value

    def section(self, key: str) -> "Section":
        """The mapping below a key; an empty one if there is none."""
        return Section(self.take(key), f"{self._path}{key}.", self.refused)

    def whole(self, key: str) -> int | None:
        """A whole number, which may be written 5e8."""
        value = self.number(key)
        if value is None or value == int(value):
            return None if value is None else int(value)
        self.refuse(key, value, "give a whole number")
        return None

    def number(self, key: str) -> float | None:
        """A finite number."""
        value = self.take(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63):
            return value
        self.refuse(key, value, "give a number")
        return None

    def flag(self, key: str) -> bool | None:
        """True or false."""
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return value
        self.refuse(key, value, "give true or false")
        return None

    def word(self, key: str, remedies: Mapping[str, str] | None = None) -> str | None:
        """A text; one of `remedies` is refused with what to do instead."""
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, value, "give a text")
            return None
        if value is not None and remedies and value in remedies:
            self.refuse(key, value, remedies[value])
            return None
        return value

    def expect(self, key: str, values: Sequence[Any], remedy: str) -> None:
        """Takes a key that is not ours to set; any but these values, and null, is refused."""
        value = self.take(key)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            self.refuse(key, value, remedy)

    def drop(self) -> None:
        """Takes all keys that are left, which mean nothing beside what was taken."""
        self._left = {}

    def refuse(self, key: str, value: Any, remedy: str) -> None:
        """Notes a value that has no counterpart."""
        self.refused.append(f"{self._path}{key}: {shown(value)} ({remedy})")

    def finish(self, remedies: Mapping[str, str] | None = None) -> None:
        """Refuses the keys that were not taken, each with its remedy."""
        for key, value in self._left.items():
            if value is not None and value != AUTO and not _is_switched_off(value):
                self.refuse(key, value, (remedies or {}).get(key, "is not known here; remove it"))
        self._left = {}


def check_refused(path: Path, refused: Sequence[str]) -> None:
    """Ends the reading of a file.

    Raises:
        ConfigError: something was refused: naming all of it.
    """
    if refused:
        raise ConfigError(f"{path}: has no counterpart here: {'; '.join(refused)}")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ConfigError: it is missing, too large, not JSON, or names a key twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: {reason}; give the path of an existing JSON file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; give a file with settings alone")
    try:
        return json.loads(data, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({reason_of(error)})") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError(f"a key comes twice in {shown([key for key, _ in pairs])}")
    return mapping


def _is_switched_off(value: Any) -> bool:
    """Whether a value, or the section it is, asks for nothing."""
    if isinstance(value, Mapping):
        return value.get("enabled", bool(value)) is False
    return value is False or value == [] or value == ""

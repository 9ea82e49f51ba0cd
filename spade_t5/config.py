"""From YAML and the command line to typed, frozen dataclasses.

A config dataclass lives beside the class it builds; this file only fills such dataclasses from plain mappings and writes them
back. Unknown keys, wrong types and missing values are `ConfigError`s that show the dotted path. Precedence: defaults, then files
in the order given (a file may name others under `defaults`), then `key=value` words of the command line.

A file may come from anybody: it makes plain values alone, of bounded size and depth, and nothing in it ends in another error than these.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from spade_t5.errors import ConfigError
from spade_t5.messages import one_line, reason_of, shown, without_credentials

T = TypeVar("T")
ConfigDict = dict[str, Any]

_MAX_FILE_BYTES = 2**18
_MAX_VALUES = 100_000
_MAX_DEPTH = 32
_MAX_INTEGER = 2**63 - 1


def read_yaml(path: Path) -> ConfigDict:
    """The mapping in a YAML file, with the files it names under `defaults` (relative to it) merged below it.

    Raises:
        ConfigError: the file is missing, is not YAML, is too large, does not hold a mapping, or names itself under `defaults`.
    """
    return _read_yaml(path, ())


def _read_yaml(path: Path, above: tuple[Path, ...]) -> ConfigDict:
    """As `read_yaml`, for a file that those `above` name, each the next."""
    try:
        if path.resolve() in above:
            raise ConfigError(
                f"defaults: config file {path} names itself, by itself or through others; remove one of them"
            )
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # a link that leads to itself; a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config file {path}: {reason}; give the path of an existing YAML file") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"config file {path}: larger than {_MAX_FILE_BYTES} bytes; give a file with settings alone")
    try:
        content = _parse_yaml(data.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"config file {path}: not valid YAML ({error})") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path}: holds a {type(content).__name__}, expected a mapping of keys to values")
    names = content.pop("defaults", [])
    if not (_is_list(names) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"defaults: {shown(names)} in {path} is not a list of file names")
    merged: ConfigDict = {}
    for name in names:
        merged = merge(merged, _read_yaml(path.parent / name, (*above, path.resolve())))
    return merge(merged, content)


def _parse_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        ValueError: it is none, or holds more than settings can: with a reason of one line.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # A value that does not fit its tag, such as `!!bool maybe`, ends in whatever PyYAML's conversion stumbles over.
        raise ValueError(reason_of(error, max_bytes=400)) from None
    _check_extent(content)
    return content


def _check_extent(content: Any) -> None:
    """Refuses depth without end and what a few aliases unfold to: a value counts as often as it can be reached.

    Raises:
        ValueError: there is too much.
    """
    left, num_values = [(content, 0)], 0
    while left:
        value, depth = left.pop()
        num_values += 1
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if num_values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values, aliases unfolded")
        if isinstance(value, Mapping):
            left.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif _is_list(value):
            left.extend((item, depth + 1) for item in value)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> ConfigDict:
    """`below` with every value of `above` put over it; nested mappings are merged key by key.

    A mapping that selects another variant (its `name` differs) replaces the old one whole.
    """
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def apply_overrides(mapping: Mapping[str, Any], words: Sequence[str]) -> ConfigDict:
    """`mapping` with the command line's `dotted.key=value` words put over it; values are read as YAML.

    Raises:
        ConfigError: a word is not of the form key=value.
    """
    result: ConfigDict = dict(mapping)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"argument {shown(word)}: expected key=value, such as training.steps=1000")
        try:
            value = _parse_yaml(text)
        except ValueError:
            raise ConfigError(f"argument {shown(word)}: {shown(text)} is not a YAML value") from None
        parts = key.split(".")
        if len(parts) > _MAX_DEPTH:
            raise ConfigError(f"argument {shown(word)}: has {len(parts)} keys within each other, no config has as many")
        for part in reversed(parts):
            value = {part: value}
        result = merge(result, value)
    return result


def from_mapping(cls: type[T], mapping: Any, path: str = "") -> T:
    """Builds the dataclass `cls` from a mapping, checking every key and type.

    Args:
        cls: a dataclass; its fields may be numbers, strings, booleans, `X | None`, tuples, dictionaries, dataclasses,
            or unions of dataclasses that are told apart by their class variable `name`; a mapping without it means the variant with the
            class variable `is_default`, if there is one.
        mapping: the values, as YAML gives them.
        path: dotted path of `mapping` in the whole tree, for messages.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a rule of the dataclass itself is broken.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or 'config'}: {shown(mapping)} is not a mapping of keys to values")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in mapping:
        if key not in fields:
            name = _key_text(key)
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{prefix}{name}: unknown config key; {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{prefix}{missing[0]}: required and not given; set it in the config file or as {prefix}{missing[0]}=..."
        )
    values = {key: _convert(hints[key], value, f"{prefix}{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{prefix}{error}" if path else str(error)) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        _check_plain(value, path)
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if origin is tuple:
        if not _is_list(value):
            raise ConfigError(f"{path}: {shown(value)} is not a list")
        item_hint = typing.get_args(hint)[0]
        return tuple(_convert(item_hint, item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {shown(value)} is not a mapping of keys to values")
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path}: its key {shown(key)} is a {type(key).__name__}, expected a name")
            _check_plain(item, f"{path}.{_key_text(key)}")
        return dict(value)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise ConfigError(f"{path}: {shown(value)} is not one of {', '.join(map(repr, allowed))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping) and hasattr(hint, "name") and "name" not in _field_names(hint):
            value = {key: item for key, item in value.items() if key != "name"}
        return from_mapping(hint, value, path)
    _check_plain(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value} is not a finite number")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{path}: {shown(value)} is a {type(value).__name__}, expected {hint.__name__}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, path)
    variants = {_variant_name(option): option for option in options if dataclasses.is_dataclass(option)}
    if variants:
        name = value.get("name", _default_variant(variants)) if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name not in variants:
            raise ConfigError(f"{path}.name: {shown(name)} is not one of {', '.join(sorted(variants))}")
        return _convert(variants[name], value, path)
    for option in options:
        try:
            return _convert(option, value, path)
        except ConfigError:
            # What is wrong inside a list says more than that it is no number.
            if _is_list(value) and typing.get_origin(option) is tuple:
                raise
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{path}: {shown(value)} is a {type(value).__name__}, expected {names}")


def _check_plain(value: Any, path: str) -> None:
    """Refuses, at any depth, what no setting can be and what would only be noticed much later.

    Raises:
        ConfigError: a number beyond 64 bits or without a value, or text that no file can hold or be named by.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{path}.{_key_text(key)}")
    elif _is_list(value):
        for i, item in enumerate(value):
            _check_plain(item, f"{path}[{i}]")
    elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
        raise ConfigError(f"{path}: an integer of {value.bit_length()} bits is too large, at most 63 are allowed")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: {value} is not a finite number")
    elif isinstance(value, str) and ("\0" in value or not _is_encodable(value)):
        raise ConfigError(f"{path}: {shown(value)} holds a character that no file can hold; remove it")


def _key_text(key: object) -> str:
    """A key for messages, on one line and not too long."""
    return one_line(key if isinstance(key, str) else shown(key), max_bytes=200)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _default_variant(variants: Mapping[str, Any]) -> str | None:
    return next((name for name, variant in variants.items() if getattr(variant, "is_default", False)), None)


def _variant_name(variant: Any) -> str:
    return variant.name


def _field_names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def to_mapping(config: Any) -> ConfigDict:
    """The inverse of `from_mapping`: plain values that YAML can hold, variants carrying their `name`.

    Credentials in URLs and tokens are masked, since what is made of it is written to files that are passed on.
    """
    result: ConfigDict = {}
    if hasattr(config, "name") and "name" not in _field_names(type(config)):
        result["name"] = config.name
    for field in dataclasses.fields(config):
        result[field.name] = _plain(getattr(config, field.name))
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (str, Path)):
        return without_credentials(str(value))
    return value


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text of a resolved config, keys in their order in the dataclasses."""
    return yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)

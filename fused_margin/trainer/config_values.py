"""Configurations as plain nested values, and as YAML files."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from .options import plain

Config = TypeVar("Config")
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class ConfigError(ValueError):
    """Values that are no configuration; the message names the option."""


def to_plain(config: Any) -> dict[str, Any]:
    """The options of a dataclass and its sections, paths as text."""
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def overlay(config: Config, values: Any, section: str = "") -> Config:
    """A dataclass with `values` in place of some of its own, nested as its sections are.

    Raises:
        ConfigError: an option is unknown, or its value of the wrong type.
        ValueError: the dataclass refuses a value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section or 'configuration'}: expected options with values, got {values!r}")
    kinds = typing.get_type_hints(type(config))
    changes = {}
    for name, value in values.items():
        option = f"{section}.{name}" if section else str(name)
        if name not in kinds:
            raise ConfigError(f"{option}: no such option; there are {', '.join(kinds)}")
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            changes[name] = overlay(current, value, option)
            continue
        try:
            changes[name] = _converted(kinds[name], value)
        except TypeError:
            raise ConfigError(f"{option}: expected {_described(kinds[name])}, got {value!r}") from None
    return dataclasses.replace(config, **changes)


def missing_options(complete: Mapping[str, Any], values: Mapping[str, Any], section: str = "") -> list[str]:
    """Options of `complete` that `values` do not give."""
    missing = []
    for name, value in complete.items():
        if name not in values:
            missing.append(section + name)
        elif isinstance(value, Mapping) and value:
            missing += missing_options(value, values[name], f"{section}{name}.")
    return missing


def read_file(path: Path) -> dict[str, Any]:
    """The values in a YAML file.

    Raises:
        ConfigError: it cannot be read, or holds no options.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected options with values, got {values!r}")
    return values


def write_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as YAML, in their order."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None), encoding="utf-8")


def _converted(kind: Any, value: Any) -> Any:
    """`value` as this type; raises TypeError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is not types.NoneType):
            try:
                return _converted(choice, value)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, list | tuple) and arguments[-1] is ... else arguments
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            return tuple(map(_converted, kinds, value))
    elif origin is dict:
        if isinstance(value, Mapping):
            return plain(value)
    elif type(value) is kind or value is None and kind is types.NoneType:
        return value
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-3 for text
        except ValueError:
            pass
    raise TypeError


def _described(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(choice) for choice in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        number = "a list of" if arguments[-1] is ... else f"a list of {len(arguments)}:"
        return f"{number} {_described(arguments[0])} each"
    if origin is dict:
        return "names with values"
    return "null" if kind is types.NoneType else NAMES.get(kind, str(kind))

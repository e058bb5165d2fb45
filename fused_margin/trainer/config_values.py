"""Configurations from plain values and YAML files, validated by pydantic."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from .options import suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


class ConfigError(ValueError):
    """Invalid configuration values; the message names the option."""


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which is text in YAML 1.1."""


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` would read as a number."""


for kind in (Loader, Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


@cache
def adapter(kind: type[Config]) -> TypeAdapter[Config]:
    return TypeAdapter(kind)


def to_plain(config: DataclassInstance) -> dict[str, Any]:
    """The options of a dataclass and its sections, with paths as text."""
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def overlay(config: Config, values: Any) -> Config:
    """A configuration with some of its options replaced by nested `values`.

    Raises:
        ConfigError: an option is unknown, or its value has a wrong type.
        ValueError: the configuration refuses a value.
    """
    try:
        # As JSON, because strict validation accepts its lists for tuples, and its text for paths.
        return adapter(type(config)).validate_json(json.dumps(_merged(config, values)))
    except ValidationError as error:
        (first, *_) = error.errors()
        if first["type"] == "value_error":
            raise first["ctx"]["error"] from None
        *section, name = first["loc"]
        if first["type"] == "unexpected_keyword_argument":
            reason, hint = "no such option", suggestion(name, _names_of(config, section))
        else:
            choices = [each for each in first.get("ctx", {}).get("expected", "").split("'") if each.isprintable()]
            reason, hint = first["msg"], suggestion(first["input"], choices)
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {reason}, got {first['input']!r}{hint}") from None
    except TypeError as error:
        raise ConfigError(f"a value is neither number, text, list nor mapping: {error}") from None


def _names_of(config: Any, section: Iterable[int | str]) -> list[str]:
    """Names of the options of a section of a dataclass."""
    for name in section:
        config = getattr(config, str(name))
    return [field.name for field in dataclasses.fields(config)]


def _merged(config: Any, values: Any) -> Any:
    """The plain options of a dataclass, with `values` replacing its own; other values replace them as a whole."""
    merges = dataclasses.is_dataclass(config) and isinstance(values, Mapping)
    if not merges:
        return values
    merged = {name: _merged(getattr(config, name, None), value) for name, value in values.items()}
    return to_plain(config) | merged


def missing_options(complete: Mapping[str, Any], values: Mapping[str, Any], section: str = "") -> list[str]:
    """Options of `complete` that are not in `values`."""
    missing = []
    for name, value in complete.items():
        if name not in values:
            missing.append(section + name)
        elif isinstance(value, Mapping) and value:
            missing += missing_options(value, values[name], f"{section}{name}.")
    return missing


def read_file(path: Path) -> dict[str, Any]:
    """The values of a YAML file.

    Raises:
        ConfigError: it cannot be read, or has no options.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected options with values, such as `epochs: 3`, got {values!r}")
    return values


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, default_flow_style=None)


def write_file(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as a YAML file."""
    path.write_text(to_yaml(values), encoding="utf-8")

"""Renders the templates: the values that all pages have in common, and the file of a page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from . import charts

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Number(NamedTuple):
    """A number of the report: its exact value for programs, and its text for readers."""

    value: float
    text: str
    note: str = ""  # beside it, as a standard deviation
    best: bool = False  # of its column, beyond the spread


class Result(NamedTuple):
    """A headline number with its name and an explanation."""

    name: str
    number: Number
    text: str


class Facts(NamedTuple):
    """A titled list of names and values."""

    title: str
    rows: Sequence[tuple[str, Any]]


class Command(NamedTuple):
    """A command to copy, and its purpose."""

    purpose: str
    line: str


class Table(NamedTuple):
    """A table. The cells are text or numbers; the first of a row is its heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Number]]


def percent(value: float, std: float | None = None) -> Number:
    """A share, with its standard deviation if it has one."""
    return Number(value, f"{value:.2%}", "" if std is None else f"± {std:.2%}")


def command_line(program: str, config: DataclassInstance) -> str:
    """The command whose options give `config`, a dataclass without sections; options with their default are omitted.

    Fields without a default are positional.
    """
    words = program.split()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING:
            words.append(str(value))
        elif value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def version_facts(versions: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of the versions in a report."""
    return [(name, versions[name]) for name in ("fused_margin", "torch", "python")]


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> None:
    """Render a template of this package to a file."""
    text = _environment().get_template(template).render(values)
    # File names may have bytes that are not UTF-8, as surrogates.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fused_margin.trainer.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = lambda value: f"{value:.1f}"
    environment.tests["number"] = lambda value: isinstance(value, Number)
    environment.globals.update(width=charts.WIDTH, left=charts.LEFT, right=charts.RIGHT, bottom=charts.BOTTOM)
    return environment

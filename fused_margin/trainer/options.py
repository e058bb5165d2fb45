"""Options with free names, which are NAME=VALUE on the command line and a mapping in files, and texts about options."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro
from pydantic import AfterValidator
from tyro.constructors import PrimitiveConstructorSpec


def suggestion(word: object, choices: Iterable[str]) -> str:
    """The end of an error message about an unknown `word`."""
    close = difflib.get_close_matches(str(word), list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words to a dictionary. Values are Python literals; other values are text."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"expected NAME=VALUE, got {word!r}")
        options[name] = _parse_value(value)
    return options


def plain(value: Any) -> Any:
    """Convert lists to tuples, so that files, checkpoints and the command line give equal values.

    Raises:
        TypeError: the value cannot be stored in a checkpoint and a YAML file.
    """
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError


def _parse_value(text: str) -> Any:
    try:
        return plain(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text
    except TypeError:
        raise ValueError(f"expected numbers, text, None, or lists and dictionaries of them, got {text}") from None


def _words(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_word(value)}" for name, value in options.items()]


def _word(value: Any) -> str:
    return value if isinstance(value, str) and _parse_value(value) == value else repr(value)


NamedOptions = Annotated[
    dict[str, Any],
    AfterValidator(plain),
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=parse_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=_words,
    ),
    tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default or 'none'})"),
]

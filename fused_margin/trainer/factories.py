"""A user's own backbone or detector: a factory, imported by its dotted name and called with options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def call_factory(option: str, name: str, options: Mapping[str, Any], refused: type[Exception]) -> Any:
    """Import `package.module.factory` and call it with the options.

    Args:
        option: the option that names the factory, for error messages.
        refused: the type of the errors.

    Raises:
        refused: the factory does not exist, or refuses the options.
    """
    factory = _find(option, name, refused)
    try:
        return factory(**options)
    except Exception as error:  # it is the user's
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise refused(f"{option}: {name}({given}) failed: {type(error).__name__}: {error}") from error


def _find(option: str, name: str, refused: type[Exception]) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not attribute:
        raise refused(f"{option}: expected package.module.factory, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise  # the module exists, but one of its imports does not
        raise refused(f"{option}: no module {missing!r}; it must be installed or on PYTHONPATH") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError:
        raise refused(f"{option}: {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise refused(f"{option}: expected {name} to be a class or function, got {type(factory).__name__}")
    return factory

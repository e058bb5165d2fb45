"""A user's own backbone: a factory, imported by its dotted name and called with options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .config import BackboneError


def make_backbone(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Import `package.module.factory` and call it with the options.

    Raises:
        BackboneError: the factory does not exist, refuses the options, or does not return an nn.Module.
    """
    factory = _find(name)
    try:
        backbone = factory(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise BackboneError(f"backbone: {name}({given}) failed: {error}") from error
    if not isinstance(backbone, nn.Module):
        raise BackboneError(f"backbone: expected {name} to return an nn.Module, got {type(backbone).__name__}")
    return backbone


def _find(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not attribute:
        raise BackboneError(f"backbone: expected package.module.factory, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise  # the module exists, but one of its imports does not
        raise BackboneError(f"backbone: no module {missing!r}; it must be installed or on PYTHONPATH") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError:
        raise BackboneError(f"backbone: {module_name} has no {attribute!r}") from None
    if not callable(factory):
        raise BackboneError(f"backbone: expected {name} to be a class or function, got {type(factory).__name__}")
    return factory

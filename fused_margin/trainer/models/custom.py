"""A user's own backbone: a factory, imported by its dotted name and called with options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..factories import call_factory
from .config import BackboneError


def make_backbone(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Import `package.module.factory` and call it with the options.

    Raises:
        BackboneError: the factory does not exist, refuses the options, or does not return an nn.Module.
    """
    backbone = call_factory("backbone", name, options, BackboneError)
    if not isinstance(backbone, nn.Module):
        raise BackboneError(f"backbone: expected {name} to return an nn.Module, got {type(backbone).__name__}")
    return backbone

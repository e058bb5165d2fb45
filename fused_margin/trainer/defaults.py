"""What the help of an option shows instead of the default None."""

from __future__ import annotations

from typing import Any


def none_means(rule: str) -> Any:
    """Lets the help of an option show `rule` instead of the default None."""
    try:
        import tyro
    except ImportError:  # configurations of networks are used without the command line, and its package
        return rule
    return tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {rule if default == 'None' else default})")

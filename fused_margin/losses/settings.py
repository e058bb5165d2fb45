"""Settings: constructor arguments that may be changed between steps, with the checks of the constructor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fused_margin import _checks
from fused_margin.margins import BEYOND_PI, GRADIENT, Margin, warn_of_degrees

Check = Callable[[str, Any], Any]  # raises, or returns the value to store


class Settings(nn.Module):
    """A module that checks its settings whenever they are set, in the constructor and later.

    If a check raises, the setting does not change. Settings are ordinary attributes: they are read, copied and pickled
    as such, and torch.compile traces them.

    Attributes:
        SETTINGS: the check of each setting, including the settings of the base classes.
        FIXED: attributes and properties that determine the parameters. They can be set once, in the constructor.
    """

    SETTINGS: ClassVar[dict[str, Check]] = {}
    FIXED: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        bases = reversed(cls.__mro__)
        cls.SETTINGS = {name: check for base in bases for name, check in vars(base).get("SETTINGS", {}).items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.FIXED and hasattr(self, name):
            raise AttributeError(
                f"{name}: cannot be changed, because the parameters depend on it; construct a new module"
            )
        if name not in self.SETTINGS:
            super().__setattr__(name, value)
            return
        value = self.SETTINGS[name](name, value)
        current = {setting: self.__dict__[setting] for setting in self.SETTINGS if setting in self.__dict__}
        self.check_together({**current, name: value})
        self.store_setting(name, value)
        self.setting_changed(name)

    def check_together(self, values: dict[str, Any]) -> None:
        """Raises if settings exclude each other. During construction some settings are missing."""

    def store_setting(self, name: str, value: Any) -> None:
        """Stores a setting that has passed its checks."""
        super().__setattr__(name, value)

    def setting_changed(self, name: str) -> None:
        """Updates values derived from a setting. Also called during construction."""


def number(low: float, high: float = np.inf, *, open_low: bool = False) -> Check:
    return partial(_number, low=low, high=high, open_low=open_low)


def _number(name: str, value: float, low: float, high: float, open_low: bool) -> float:
    _checks.number(name, value, low, high, open_low=open_low)
    return as_float(value)


def angle(low: float) -> Check:
    """An angular margin. A value above pi triggers a warning."""
    return partial(_angle, low=low)


def _angle(name: str, value: float, low: float) -> float:
    _checks.number(name, value, low)
    warn_of_degrees(name, value)
    return as_float(value)


def angles(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Two angular margins in ascending order."""
    value = interval(name, value, 0.0)
    warn_of_degrees(f"{name}[1]", value[1])
    return value


def interval(name: str, value: tuple[float, float], low: float, *, open_low: bool = False) -> tuple[float, float]:
    first, second = _checks.interval(name, value, low, open_low=open_low)
    return as_float(first), as_float(second)


def norms(name: str, value: tuple[float, float]) -> tuple[float, float]:
    return interval(name, value, 0.0, open_low=True)


def margin_number(name: str, value: float | Tensor) -> float | Tensor:
    """m1, m2 or m3 of :class:`fused_margin.Margin`."""
    number_of_margin: dict[str, Any] = {name: value}
    Margin(**number_of_margin)  # checks the value
    if name == "m2" and _checks.is_number(value):
        warn_of_degrees(name, value)
    return as_float(value)


def scale(name: str, value: float | Tensor | None) -> float | Tensor | None:
    _checks.scale(value)
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(f"scale: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"scale: expected a number or a floating-point tensor, got {value.dtype}")
    return as_float(value)


def alpha(name: str, value: float | nn.Parameter | None) -> float | nn.Parameter | None:
    """alpha of L2-softmax: a number, a learned parameter, or None for a new learned parameter."""
    if value is not None and not isinstance(value, nn.Parameter):
        _checks.number(name, value, 0.0, open_low=True)
    return as_float(value)


def one_of(*allowed: str) -> Check:
    return partial(_checks.one_of, allowed=allowed)


def boolean(name: str, value: bool) -> bool:
    """True or False, or 0 or 1, including NumPy's types."""
    if not isinstance(value, (int, np.integer, np.bool_)) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def integer(name: str, value: int) -> int:
    return _checks.integer(name, value)


def as_float(value: Any) -> Any:
    """Converts a number to a float: in torch.compile floats are variables, but integers and NumPy's numbers constants."""
    return float(value) if _checks.is_number(value) else value


# Checks of options that several modules share.
REDUCTION: Check = one_of(*_checks.REDUCTIONS)
LABEL_SMOOTHING: Check = number(0.0, 1.0)
WORKSPACE_MB: Check = number(0.0, open_low=True)
MARGIN_OPTIONS: dict[str, Check] = {"beyond_pi": one_of(*BEYOND_PI), "easy": boolean, "gradient": one_of(*GRADIENT)}

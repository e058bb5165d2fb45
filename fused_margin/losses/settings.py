"""Constructor arguments that may be changed between steps, checked as the constructor checks them."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fused_margin import _checks
from fused_margin.margins import BEYOND_PI, GRADIENT, Margin, is_number, warn_of_degrees

Check = Callable[[str, Any], Any]  # raises, or returns the value to keep


class Settings(nn.Module):
    """A module whose settings are checked wherever they are set: in the constructor, and later on.

    A setting that fails its check raises, and the module keeps its old one. Settings are ordinary attributes, so they
    are read, copied and pickled as such, and torch.compile traces them.

    Attributes:
        SETTINGS: the check of each setting, including the settings of the base classes.
        FIXED: attributes, or properties, that the parameters depend on: they can be set once, in construction.
    """

    SETTINGS: ClassVar[dict[str, Check]] = {}
    FIXED: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        bases = reversed(cls.__mro__)
        cls.SETTINGS = {name: check for base in bases for name, check in vars(base).get("SETTINGS", {}).items()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.FIXED and hasattr(self, name):
            raise AttributeError(f"{name}: cannot be changed, because the parameters depend on it; make a new loss")
        if name not in self.SETTINGS:
            super().__setattr__(name, value)
            return
        value = self.SETTINGS[name](name, value)
        given = {known: self.__dict__[known] for known in self.SETTINGS if known in self.__dict__}
        self.check_together({**given, name: value})
        self.keep_setting(name, value)
        self.setting_changed(name)

    def check_together(self, values: dict[str, Any]) -> None:
        """Raises where settings exclude each other. During construction some are still missing."""

    def keep_setting(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def setting_changed(self, name: str) -> None:
        """Updates what was derived from a setting. Called in construction too."""


def number(low: float, high: float = np.inf, *, open_low: bool = False) -> Check:
    return partial(_number, low=low, high=high, open_low=open_low)


def _number(name: str, value: float, low: float, high: float, open_low: bool) -> float:
    _checks.number(name, value, low, high, open_low=open_low)
    return real(value)


def angle(low: float) -> Check:
    """An angular margin; one that is hardly radians triggers a warning."""
    return partial(_angle, low=low)


def _angle(name: str, value: float, low: float) -> float:
    _checks.number(name, value, low)
    warn_of_degrees(name, value)
    return real(value)


def angles(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Two angular margins, ascending."""
    value = interval(name, value, 0.0)
    warn_of_degrees(f"{name}[1]", value[1])
    return value


def interval(name: str, value: tuple[float, float], low: float, *, open_low: bool = False) -> tuple[float, float]:
    return tuple(map(real, _checks.interval(name, value, low, open_low=open_low)))


def norms(name: str, value: tuple[float, float]) -> tuple[float, float]:
    return interval(name, value, 0.0, open_low=True)


def margin_number(name: str, value: float | Tensor) -> float | Tensor:
    """m1, m2 or m3, as :class:`fused_margin.Margin` takes it."""
    Margin(**{name: value})  # raises
    if name == "m2" and is_number(value):
        warn_of_degrees(name, value)
    return real(value)


def scale(name: str, value: float | Tensor | None) -> float | Tensor | None:
    _checks.scale(value)
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(f"scale: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    return real(value)


def length(name: str, value: float | nn.Parameter | None) -> float | nn.Parameter | None:
    """alpha of L2-softmax; a parameter is learned, and None is the start of one."""
    if value is not None and not isinstance(value, nn.Parameter):
        _checks.number(name, value, 0.0, open_low=True)
    return real(value)


def one_of(*allowed: str) -> Check:
    return partial(_checks.one_of, allowed=allowed)


def switch(name: str, value: bool) -> bool:
    """True or False; 0 and 1, and NumPy's, are taken too."""
    if not isinstance(value, (int, np.integer, np.bool_)) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def index(name: str, value: int) -> int:
    _checks.index(name, value)
    return value


def real(value: Any) -> Any:
    """A number as a float: torch.compile takes those for variables, and integers and NumPy's numbers for constants."""
    return float(value) if is_number(value) else value


# the options of torch.nn.CrossEntropyLoss, and of the scratch memory
REDUCTION = one_of(*_checks.REDUCTIONS)
LABEL_SMOOTHING = number(0.0, 1.0)
WORKSPACE_MB = number(0.0, open_low=True)
MARGIN_OPTIONS = {"beyond_pi": one_of(*BEYOND_PI), "easy": switch, "gradient": one_of(*GRADIENT)}

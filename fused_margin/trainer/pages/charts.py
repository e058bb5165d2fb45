"""Charts as SVG: scales, ticks and paths in the coordinates of the drawing, which the template `charts.html` writes.

Colors come from classes of the style sheet, so that charts follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360.0, 236.0  # of a chart, in pixels at phone width
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 24.0, 38.0  # margins for ticks and labels
MAX_POINTS = 240  # of a line; longer lines are averaged over bins of equal width
MAX_DOTS = 40  # a line of at most as many points has a dot at each
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Color = Literal["first", "second", "third", "quiet"]


class Tick(NamedTuple):
    """A position of an axis, in pixels, and its text."""

    position: float
    text: str


class Dot(NamedTuple):
    """A point and the text that is shown when it is pointed at."""

    x: float
    y: float
    text: str


class Mark(NamedTuple):
    """A shape of a chart: a path, or dots or smaller points. A label puts it into the legend."""

    kind: Literal["line", "dashes", "area", "band", "points", "dots"]
    color: Color
    path: str = ""
    dots: Sequence[Dot] = ()
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, ready for the template."""

    title: str
    summary: str  # what it shows in words, for readers who cannot see it
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    height: float = HEIGHT
    top: float = TOP
    row_labels: Sequence[Tick] = field(default_factory=tuple)  # names of the rows, if it has rows

    @property
    def legend(self) -> list[Mark]:
        """The marks with a label."""
        return [mark for mark in self.marks if mark.label]


@dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end`, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        low, high, given = self.low, self.high, np.asarray(values, float)
        if self.log:
            low, high, given = math.log10(low), math.log10(high), np.log10(given)
        return self.start + (given - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[Tick]:
        """About five round values of the scale."""
        if not self.log:
            values = [v for v in linear_ticks(self.low, self.high) if self.low <= v <= self.high]
            texts = tick_texts(values)
        else:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / 5))
            exponents = list(range(last, first - 1, -step))[::-1]
            values = [10.0**n for n in exponents]
            texts = [
                f"{value:,g}" if 0 <= n < 4 else f"10{str(n).translate(SUPERSCRIPTS)}"
                for n, value in zip(exponents, values, strict=True)
            ]
        return [Tick(float(self(value)), text) for value, text in zip(values, texts, strict=True)]


def linear_ticks(low: float, high: float) -> list[float]:
    """About five round values, the first at most `low` and the last at least `high`. One value is widened."""
    low, high = _widened(low, high)
    ticks = list(map(float, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)))
    return [
        tick
        for tick, before, after in zip(ticks, [-math.inf, *ticks], [*ticks[1:], math.inf], strict=False)
        if after > low and before < high
    ]


def tick_texts(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as distinguish them, and powers of ten for very large and small ones."""
    largest = max(map(abs, values), default=0)
    if largest and not 1e-3 <= largest < 1e5:
        exponent = math.floor(math.log10(largest))
        power = f"·10{str(exponent).translate(SUPERSCRIPTS)}"
        return [
            f"{value / 10**exponent:g}{power}" if value else "0" for value in (round(v, 12 - exponent) for v in values)
        ]
    step = min(np.diff(values), default=1)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    decimals += round(step * 10**decimals, 6) % 1 != 0  # a step of 0.25 or 2.5
    return [f"{value + 0.0:,.{decimals}f}" for value in values]


def plot_scales(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    log_x: bool = False,
    height: float = HEIGHT,
) -> tuple[Scale, Scale]:
    """The scales of a chart of the usual margins. A range of one value is widened around it."""
    (left, right), (bottom, top) = _widened(*x_range), _widened(*y_range)
    return (
        Scale(left, right, LEFT, WIDTH - RIGHT, log_x),
        Scale(bottom, top, height - BOTTOM, TOP),
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def line_path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path of a line through points in pixels."""
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)) if len(x) else ""


def step_path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path of a line that is constant up to each next point."""
    return line_path(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1])


def bars_path(edges: np.ndarray, tops: np.ndarray, base: float) -> str:
    """SVG path of the outline of a histogram, from the `edges` (n + 1,) and `tops` (n,) of its bars."""
    inner = line_path(np.repeat(edges, 2)[1:-1], np.repeat(tops, 2))
    return f"M{edges[0]:.1f} {base:.1f}L{inner[1:]}L{edges[-1]:.1f} {base:.1f}Z"


def line_marks(
    x: np.ndarray, y: np.ndarray, scales: tuple[Scale, Scale], color: Color, label: str = "", number: str = ",.4g"
) -> list[Mark]:
    """A line through values, with dots if there are few. Many are averaged, with a band from lowest to highest."""
    to_x, to_y = scales
    marks = []
    if len(x) > 2 * MAX_POINTS:
        parts = np.array_split(np.arange(len(x)), MAX_POINTS)
        center, mean, low, high = (
            np.array([function(values[part]) for part in parts])
            for function, values in ((np.mean, x), (np.mean, y), (np.min, y), (np.max, y))
        )
        outline = line_path(np.append(to_x(center), to_x(center)[::-1]), np.append(to_y(low), to_y(high)[::-1]))
        marks.append(Mark("band", color, f"{outline}Z"))
        x, y = center, mean
    marks.append(Mark("line", color, line_path(to_x(x), to_y(y)), label=label))
    if len(x) <= MAX_DOTS:
        marks.append(Mark("points", color, dots=dots(x, y, scales, number)))
    return marks


def dots(x: np.ndarray, y: np.ndarray, scales: tuple[Scale, Scale], number: str) -> list[Dot]:
    """Dots at values; the text of each has its coordinates."""
    to_x, to_y = scales
    return [
        Dot(round(float(to_x(a)), 1), round(float(to_y(b)), 1), f"{a:,g}: {b:{number}}")
        for a, b in zip(x, y, strict=True)
    ]


def vertical_path(x: float) -> str:
    """SVG path of a vertical line through the plot, at a position in pixels."""
    return f"M{x:.1f} {TOP:.1f}V{HEIGHT - BOTTOM:.1f}"

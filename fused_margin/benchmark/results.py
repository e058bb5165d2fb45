"""What the contestants took on one problem."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from .heads import ALONE, IN_BACKWARD, Comparison, Phases
from .problems import Shape
from .timing import ratio

FP32 = 4  # bytes


@dataclass
class Row:
    """One contestant on one problem."""

    name: str
    variant: str = ""
    variants: dict[str, float] = field(default_factory=dict)  # median seconds of each, when the fastest was chosen
    rounds: list[Phases] = field(default_factory=list)
    loss_error: float | None = None  # relative, against float64
    peak_bytes: int | None = None  # above class weights, momentum and inputs
    held_bytes: int | None = None  # class weights and momentum
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [phases.whole for phases in self.rounds]

    @property
    def median(self) -> Phases | None:
        """The round with the median time of the whole step, whose phases add up to it."""
        seconds = self.seconds
        return self.rounds[seconds.index(statistics.median_low(seconds))] if seconds else None


@dataclass
class Problem:
    """All contestants on one problem."""

    shape: Shape
    rows: list[Row] = field(default_factory=list)
    alone: Row = field(default_factory=lambda: Row(ALONE))
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def itemsize(self) -> int:
        return self.comparison.torch_dtype.itemsize

    def row(self, name: str) -> Row:
        """The row of a contestant.

        Raises:
            StopIteration: it has none.
        """
        return next(row for row in (*self.rows, self.alone) if row.name == name)

    def ratio(self, name: str, reference: str = IN_BACKWARD) -> float | None:
        """Time of the whole step over that of `reference`, median over rounds; None unless both were timed."""
        timed = {row.name: row.seconds for row in self.rows if row.rounds}
        return ratio(timed[name], timed[reference]) if {name, reference} <= timed.keys() else None

    def summary(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "contestants": [_summary(row) | {"ratio": self.ratio(row.name)} for row in self.rows],
            "forward + backward alone": _summary(self.alone),
            "partialfc_bytes": partialfc_bytes(self.shape),
        }


def _phases(phases: Phases) -> dict[str, float]:
    return phases._asdict() | {"whole": phases.whole}


def _summary(row: Row) -> dict[str, Any]:
    median = row.median
    return asdict(row) | {"rounds": [_phases(each) for each in row.rounds], "median": median and _phases(median)}


def held_per_class(dim: int, itemsize: int) -> int:
    """Bytes of one class between steps: its weights and their momentum."""
    return 2 * itemsize * dim


def partialfc_bytes(shape: Shape) -> int:
    """The published memory of PartialFC without sampling: weights, momentum, gradient, and twice the logits, in fp32."""
    return 3 * FP32 * shape.classes * shape.dim + 2 * FP32 * shape.rows * shape.classes

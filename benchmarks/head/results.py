"""What the study measured, its targets, and the content of its file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.problems import Shape
from ..common.timing import ratio
from ..comparison.report import Verdict
from ..comparison.targets import mebibytes, memory_bound
from .contestants import ALONE, COMPILED, IN_BACKWARD, Phases

PROJECTED, FUSED, THEN_PROJECTED = "ProjectedSGD", "SGD(fused=True)", "SGD(fused=True), then project_"
FASTER, OVER_ALONE, OVER_FUSED = 1.8, 1.1, 2.0  # limits of the ratios of times
EXACT = 1e-12  # relative difference of both ways in float64
FP32, BF16 = 4, 2  # bytes


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

    def find(self, name: str) -> Row:
        return next((row for row in self.rows if row.name == name), Row(name))

    def ratio(self, name: str, reference: str = IN_BACKWARD) -> float | None:
        """Time of the whole step over that of `reference`, median over rounds; None unless both were timed."""
        mine, theirs = self.find(name), self.find(reference)
        return ratio(mine.seconds, theirs.seconds) if mine.rounds and theirs.rounds else None

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


@dataclass
class Study:
    """Everything that one run measured."""

    problems: list[Problem] = field(default_factory=list)
    optimizers: dict[str, list[float]] = field(default_factory=dict)  # seconds of a step by a gradient that exists
    difference: float | None = None  # of a step in the backward from the ordinary way, relative, in float64
    complete: bool = False

    def summary(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "step_in_backward_difference": self.difference,
            "problems": [problem.summary() for problem in self.problems],
            "optimizers": {
                name: {"seconds": seconds, "median": statistics.median(seconds)}
                for name, seconds in self.optimizers.items()
            },
            "counted_bytes_per_class": {
                dtype: held_per_class(problem.shape.dim, itemsize)
                for problem in self.problems[:1]
                for dtype, itemsize in (("float32", FP32), ("bfloat16", BF16))
            },
            "targets": [asdict(verdict) for verdict in judge(self)],
        }


def held_per_class(dim: int, itemsize: int) -> int:
    """Bytes of one class between steps: its weights and their momentum."""
    return 2 * itemsize * dim


def partialfc_bytes(shape: Shape) -> int:
    """The published memory of PartialFC without sampling: weights, momentum, gradient, and twice the logits, in fp32."""
    return 3 * FP32 * shape.classes * shape.dim + 2 * FP32 * shape.rows * shape.classes


def judge(study: Study) -> list[Verdict]:
    return list(_judge(study))


def _judge(study: Study) -> Iterator[Verdict]:
    if study.difference is not None:
        goal = "step in backward against gradient stored, float64"
        yield at_most(goal, study.difference, EXACT, lambda value: f"{value:.1e}")
    for problem in study.problems:
        label, ours = problem.shape.label, problem.find(IN_BACKWARD)
        faster = problem.ratio(COMPILED)
        if faster is not None:
            yield at_least(f"{label}: faster than torch.compile", faster, FASTER)
        if ours.rounds and problem.alone.rounds:
            over = ratio(ours.seconds, problem.alone.seconds)
            yield at_most(f"{label}: step over forward + backward alone", over, OVER_ALONE)
        if ours.peak_bytes is not None:
            goal = f"{label}: memory above weights and momentum, workspace + 8 floats·(N·D + C)"
            yield at_most(goal, ours.peak_bytes, memory_bound(problem.shape), mebibytes)
    if study.optimizers:
        over = ratio(study.optimizers[PROJECTED], study.optimizers[FUSED])
        yield at_most("ProjectedSGD.step over SGD(fused=True).step", over, OVER_FUSED)


def _times(value: float) -> str:
    return f"{value:.2f}×"


def at_least(goal: str, value: float, limit: float, show: Callable[[Any], str] = _times) -> Verdict:
    met = value >= limit
    return Verdict(goal, f"≥ {show(limit)}", show(value) + _missed(met, value, limit), met)


def at_most(goal: str, value: float, limit: float, show: Callable[[Any], str] = _times) -> Verdict:
    met = value <= limit
    return Verdict(goal, f"≤ {show(limit)}", show(value) + _missed(met, value, limit), met)


def _missed(met: bool, value: float, limit: float) -> str:
    return "" if met else f", missed by {abs(value / limit - 1):.1%}"

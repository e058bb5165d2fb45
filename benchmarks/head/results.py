"""What the study measured, its targets, and the content of its file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fused_margin.benchmark import heads
from fused_margin.benchmark.heads import IN_BACKWARD
from fused_margin.benchmark.results import FP32, Problem, Row, held_per_class
from fused_margin.benchmark.timing import ratio

from ..comparison.report import Verdict
from ..comparison.targets import mebibytes, memory_bound

PROJECTED, FUSED, THEN_PROJECTED = "ProjectedSGD", "SGD(fused=True)", "SGD(fused=True), then project_"
FASTER, OVER_ALONE, OVER_FUSED = 1.8, 1.1, 2.0  # limits of the ratios of times
EXACT = 1e-12  # relative difference of both ways in float64
BF16 = 2  # bytes
COMPILED = heads.COMPILED.format("ArcFace")


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


def judge(study: Study) -> list[Verdict]:
    return list(_judge(study))


def _judge(study: Study) -> Iterator[Verdict]:
    if study.difference is not None:
        goal = "step in backward against gradient stored, float64"
        yield at_most(goal, study.difference, EXACT, lambda value: f"{value:.1e}")
    for problem in study.problems:
        label = problem.shape.label
        ours = next((row for row in problem.rows if row.name == IN_BACKWARD), Row(IN_BACKWARD))
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

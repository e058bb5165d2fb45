"""Targets of the tensor-core kernels and half-precision steps, and the predictions beside the measured times."""

from __future__ import annotations

from collections.abc import Iterator

from fused_margin._ops.backends import select
from fused_margin.benchmark.timing import duration, quartiles

from ..comparison.report import Report, Section, Verdict
from ..comparison.targets import bounded_memory
from . import names, predictions
from .names import ours

FAMILIES = tuple(family.name for family in select.FAMILIES)
WHOLE_STEP_FROM = 85_000  # classes


def judge(report: Report) -> list[Verdict]:
    """Verdicts for the problems that have targets and that the run has measured on a GPU."""
    return [*_kernels(report), *_predictions(report)] if report.device == "cuda" else []


def _kernels(report: Report) -> Iterator[Verdict]:
    """Verdicts for each family. The portable kernels are measured too, and have no targets."""
    for family in FAMILIES:
        for suite in names.SUITES:
            for section in report.of(suite):
                yield from _failures(section, family)
        for section in report.of(names.EXPONENT_SUM, names.STEP):
            yield from _at_speed(section, ours(family), names.CUBLAS, 0.90)
        for section in report.of(names.NEAREST, names.CLASSES):
            yield from _at_speed(section, ours(family), names.CUBLAS, 1.70)
        for section in report.of(names.HALF_STEP):
            if section.shape.classes >= WHOLE_STEP_FROM:
                yield from _half_step(section, family)
        for section in report.of(names.LAUNCH_BOUND, names.SMALL):
            yield from _at_speed(section, ours(family), names.COMPILED, 1.00)
            yield from _at_speed(section, ours(family, names.GRAPH), names.TEXTBOOK, 2.00)


def _predictions(report: Report) -> Iterator[Verdict]:
    for each in predictions.PREDICTIONS if predictions.made_for(report.gpu) else ():
        for section in report.of(each.suite, each.shape):
            entry = section.find(each.contestant)
            if not entry or not entry.seconds:
                continue
            measured, goal = duration(quartiles(entry.seconds)[1]), f"{section.title}: {entry.name}"
            if each.reference is not None:
                ratio = section.ratio(each.reference, entry.name)
                measured += "" if ratio is None else f", {ratio:.2f}×"
                goal += f", and time of {each.reference} over it"
            yield Verdict(goal, f"predicted {each.text}", measured, None)


def _half_step(section: Section, family: str) -> Iterator[Verdict]:
    """A step of ours has four products, since the backward recomputes the exponentials that were not saved."""
    yield from _at_speed(section, ours(family), names.FOUR, 0.80)
    yield from _at_speed(section, ours(family), names.TEXTBOOK, 5.00)
    for name in (names.COMPILED, names.RECOMPUTING):
        yield from _at_speed(section, ours(family, names.NOTHING_KEPT), name, 1.15)
        yield from _at_speed(section, ours(family), name, 1.40)
    for name, limit in ((names.CUT, 3.0), (names.LIGER, 3.0), (names.LINEAR, 2.0)):
        yield from _at_speed(section, ours(family, names.NORMFACE), name, limit)
    if section.shape in names.LARGE:
        yield from bounded_memory(section, ours(family))
    for backend, limit in ((family, 5e-4), (f"{family} {select.SPLIT}", 1e-5)):
        entry, eager = section.find(ours(backend)), section.find(names.TEXTBOOK)
        if not entry or entry.gradient_error is None:
            continue
        error = entry.gradient_error
        goal = f"{section.shape.label}: gradient error of {entry.name}"
        yield Verdict(f"{goal} against float64", f"≤ {limit:.0e}", f"{error:.1e}", error <= limit)
        if eager and eager.gradient_error is not None:
            times = eager.gradient_error / error
            yield Verdict(f"{goal} below that of {eager.name}", "≥ 20×", f"{times:.0f}×", times >= 20)


def _failures(section: Section, family: str) -> Iterator[Verdict]:
    for entry in section.entries:
        if entry.failure and entry.name.startswith(ours(family)):
            yield Verdict(f"{section.title}: {entry.name}", "runs, and is correct", entry.failure, False)


def _at_speed(section: Section, mine: str, theirs: str, least: float) -> Iterator[Verdict]:
    """Ratio of speeds; nothing unless both were timed."""
    ratio = section.ratio(theirs, mine)
    if ratio is not None:
        goal = f"{section.title}: {mine} against {theirs}"
        yield Verdict(goal, f"≥ {least:.2f}× its speed", f"{ratio:.2f}×", ratio >= least)

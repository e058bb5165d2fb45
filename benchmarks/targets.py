"""What the library promises, beside what a run measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fused_margin._ops.backends import select

from . import half, kernels, peers, predictions
from .half import ours
from .problems import Shape
from .results import Report, Section
from .timing import duration, quartiles

STEP = Shape(256, 512, 100_000)
TALL_STEP = Shape(1024, 512, 10_000)
MEMORY = Shape(256, 512, 1_000_000)
EXCLUSIVE = Shape(256, 512, 10_575)

OURS = (peers.OURS, peers.OURS_SMALL, peers.OURS_NORMFACE)
NORMFACE_PEERS = (peers.LINEAR, peers.LINEAR_CHUNKED)
ARCFACE_PEERS = (peers.COMPILED, peers.LEAN, peers.TEXTBOOK, peers.PML)

FAMILIES = tuple(family.name for family in select.FAMILIES)
WHOLE_STEP_FROM = 85_000  # classes


@dataclass(frozen=True)
class Verdict:
    goal: str
    target: str
    measured: str
    met: bool | None  # None: a prediction, which is for comparison only


def judge(report: Report) -> list[Verdict]:
    """Verdicts on whatever of the promised problems the run has measured, and on nothing else."""
    verdicts: list[Verdict] = []
    for section in report.of("step", STEP):
        verdicts += _step(section)
    for section in report.of("step", TALL_STEP):
        verdicts += _tall_step(section)
    for section in report.of("memory", MEMORY):
        verdicts += _memory(section)
    for section in report.of("exclusive", EXCLUSIVE):
        verdicts += _exclusive(section)
    for section in report.of("accuracy"):
        verdicts += _accuracy(section)
    if report.device == "cuda":
        verdicts += [*_kernels(report), *_predictions(report)]
    if report.checks:
        passed = sum(check.passed for check in report.checks)
        verdicts.append(
            Verdict(
                "gradients at cos = ±1, zero rows, s·cos up to 500",
                "finite and right",
                f"{passed} of {len(report.checks)} checks pass",
                passed == len(report.checks),
            )
        )
    return verdicts


def _step(section: Section) -> Iterator[Verdict]:
    for name, limit in ((peers.OURS, 1.15), (peers.OURS_SMALL, 1.45)):
        ratio = section.ratio(name, peers.PRODUCTS)
        if ratio is not None:
            yield Verdict(
                f"{section.shape.label}: {name} against the {peers.PRODUCTS}",
                f"≤ {limit:.2f}×",
                f"{ratio:.2f}×",
                ratio <= limit,
            )
    for name, limit in ((peers.COMPILED, 1.5), (peers.LEAN, 2.5), (peers.TEXTBOOK, 4.5)):
        yield from _faster(section, name, limit)


def _tall_step(section: Section) -> Iterator[Verdict]:
    ratios = {
        name: section.ratio(name, ours)
        for ours, names in (
            (peers.OURS, ARCFACE_PEERS),
            (peers.OURS_NORMFACE, NORMFACE_PEERS),
        )
        for name in names
    }
    timed = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if timed:
        closest = min(timed, key=timed.__getitem__)
        yield Verdict(
            f"{section.shape.label}: not slower than any peer",
            "≥ 1.00× each",
            f"{timed[closest]:.2f}× ({closest})",
            timed[closest] >= 1,
        )


def _memory(section: Section) -> Iterator[Verdict]:
    yield from _bounded_memory(section, peers.OURS)


def _bounded_memory(section: Section, name: str) -> Iterator[Verdict]:
    """The bound's O(N·D + C) is taken as eight floats for each of N·D and C."""
    shape = section.shape
    bound = peers.WORKSPACE_MB * 2**20 + 8 * 4 * (shape.rows * shape.dim + shape.classes)
    entry = section.find(name)
    if entry and entry.peak_bytes is not None:
        what = "peak extra memory" + ("" if name == peers.OURS else f" of {name}")
        yield Verdict(
            f"{shape.label}: {what}",
            f"≤ workspace + 8 floats·(N·D + C) = {_mebibytes(bound)}",
            _mebibytes(entry.peak_bytes),
            entry.peak_bytes <= bound,
        )


def _kernels(report: Report) -> Iterator[Verdict]:
    """Of every family by itself; the portable way is measured beside them and has no targets."""
    for family in FAMILIES:
        for suite in kernels.SUITES:
            for section in report.of(suite):
                yield from _failures(section, family)
        for section in report.of(kernels.EXPONENT_SUM, kernels.STEP):
            yield from _at_speed(section, ours(family), kernels.CUBLAS, 0.90)
        for section in report.of(kernels.NEAREST, kernels.CLASSES):
            yield from _at_speed(section, ours(family), kernels.CUBLAS, 1.70)
        for section in report.of(kernels.HALF_STEP):
            if section.shape.classes >= WHOLE_STEP_FROM:
                yield from _half_step(section, family)
        for section in report.of(kernels.LAUNCH_BOUND, kernels.SMALL):
            yield from _at_speed(section, ours(family), half.COMPILED, 1.00)
            yield from _at_speed(section, ours(family, half.GRAPH), half.TEXTBOOK, 2.00)


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
    """The products are the four that ours multiplies: exponentials are made again in the backward, whatever is kept."""
    yield from _at_speed(section, ours(family), half.FOUR, 0.80)
    yield from _at_speed(section, ours(family), half.TEXTBOOK, 5.00)
    for name in (half.COMPILED, half.RECOMPUTING):
        yield from _at_speed(section, ours(family, half.NOTHING_KEPT), name, 1.15)
        yield from _at_speed(section, ours(family), name, 1.40)
    for name, limit in ((half.CUT, 3.0), (half.LIGER, 3.0), (half.LINEAR, 2.0)):
        yield from _at_speed(section, ours(family, half.NORMFACE), name, limit)
    if section.shape in kernels.LARGE:
        yield from _bounded_memory(section, ours(family))
    for way, limit in ((family, 5e-4), (f"{family} {select.SPLIT}", 1e-5)):
        entry, eager = section.find(ours(way)), section.find(half.TEXTBOOK)
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
            yield Verdict(f"{section.title}: {entry.name}", "runs, and is right", entry.failure, False)


def _at_speed(section: Section, mine: str, theirs: str, least: float) -> Iterator[Verdict]:
    """Ratio of speeds, where both were timed."""
    ratio = section.ratio(theirs, mine)
    if ratio is not None:
        goal = f"{section.title}: {mine} against {theirs}"
        yield Verdict(goal, f"≥ {least:.2f}× its speed", f"{ratio:.2f}×", ratio >= least)


def _exclusive(section: Section) -> Iterator[Verdict]:
    """O(C·D) is taken as four matrices of the weight's size."""
    yield from _faster(section, peers.PML_EXCLUSIVE, 3.0)
    entry = section.find(peers.OURS)
    if entry and entry.peak_bytes is not None:
        bound = 4 * 4 * section.shape.classes * section.shape.dim
        yield Verdict(
            f"exclusive term, C={section.shape.classes:,}: peak extra memory",
            f"≤ 4 floats·C·D = {_mebibytes(bound)}",
            _mebibytes(entry.peak_bytes),
            entry.peak_bytes <= bound,
        )


def _accuracy(section: Section) -> Iterator[Verdict]:
    errors = {
        entry.name: entry.gradient_error
        for entry in section.entries
        if entry.name in OURS and entry.gradient_error is not None
    }
    if errors:
        worst = max(errors, key=errors.__getitem__)
        yield Verdict(
            f"{section.shape.label}: gradient error against float64",
            "≤ 1e-5",
            f"{errors[worst]:.1e} ({worst})",
            all(error <= 1e-5 for error in errors.values()),
        )


def _faster(section: Section, name: str, limit: float) -> Iterator[Verdict]:
    ratio = section.ratio(name, peers.OURS)
    if ratio is not None:
        what = "exclusive term" if section.suite == "exclusive" else section.shape.label
        yield Verdict(f"{what}: faster than {name}", f"≥ {limit:.1f}×", f"{ratio:.2f}×", ratio >= limit)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"

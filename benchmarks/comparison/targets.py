"""Targets of the library, compared with the values that a run measured."""

from __future__ import annotations

from collections.abc import Iterator

from fused_margin.benchmark.problems import Shape

from . import peers
from .report import Report, Section, Verdict

STEP = Shape(256, 512, 100_000)
TALL_STEP = Shape(1024, 512, 10_000)
MEMORY = Shape(256, 512, 1_000_000)
EXCLUSIVE = Shape(256, 512, 10_575)

OURS = (peers.OURS, peers.OURS_SMALL, peers.OURS_NORMFACE)
NORMFACE_PEERS = (peers.LINEAR, peers.LINEAR_CHUNKED)
ARCFACE_PEERS = (peers.COMPILED, peers.LEAN, peers.TEXTBOOK, peers.PML)


def judge(report: Report) -> list[Verdict]:
    """Verdicts for the problems that have targets and that the run has measured."""
    verdicts: list[Verdict] = []
    for section in report.of("step", STEP):
        verdicts += _step(section)
    for section in report.of("step", TALL_STEP):
        verdicts += _tall_step(section)
    for section in report.of("memory", MEMORY):
        verdicts += bounded_memory(section, peers.OURS)
    for section in report.of("exclusive", EXCLUSIVE):
        verdicts += _exclusive(section)
    for section in report.of("accuracy"):
        verdicts += _accuracy(section)
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


def memory_bound(shape: Shape) -> int:
    """The workspace + O(N·D + C), which is counted as eight floats for each of N·D and C, in bytes."""
    return peers.WORKSPACE_MB * 2**20 + 8 * 4 * (shape.rows * shape.dim + shape.classes)


def bounded_memory(section: Section, name: str) -> Iterator[Verdict]:
    """Peak memory within :func:`memory_bound`."""
    shape = section.shape
    bound = memory_bound(shape)
    entry = section.find(name)
    if entry and entry.peak_bytes is not None:
        subject = "peak extra memory" + ("" if name == peers.OURS else f" of {name}")
        yield Verdict(
            f"{shape.label}: {subject}",
            f"≤ workspace + 8 floats·(N·D + C) = {mebibytes(bound)}",
            mebibytes(entry.peak_bytes),
            entry.peak_bytes <= bound,
        )


def _exclusive(section: Section) -> Iterator[Verdict]:
    """Peak memory within O(C·D), which is counted as four matrices of the size of the weight."""
    yield from _faster(section, peers.PML_EXCLUSIVE, 3.0)
    entry = section.find(peers.OURS)
    if entry and entry.peak_bytes is not None:
        bound = 4 * 4 * section.shape.classes * section.shape.dim
        yield Verdict(
            f"exclusive term, C={section.shape.classes:,}: peak extra memory",
            f"≤ 4 floats·C·D = {mebibytes(bound)}",
            mebibytes(entry.peak_bytes),
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
        subject = "exclusive term" if section.suite == "exclusive" else section.shape.label
        yield Verdict(f"{subject}: faster than {name}", f"≥ {limit:.1f}×", f"{ratio:.2f}×", ratio >= limit)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"

"""Picture of the benchmark: bars of the phases of a step, and bars of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .heads import IN_BACKWARD
from .results import FP32, Problem, partialfc_bytes

OURS, FLOOR, PEER = "#0b6e99", "#9aa5ad", "#e0a458"
PHASES = {"forward": FLOOR, "backward": OURS, "optimizer": PEER}
WEIGHTS, MOMENTUM, REST = "#5b666e", FLOOR, "#d55e00"
PARTIALFC = "PartialFC, published formula\n3 × weights + 2 × logits, not measured"


def draw(problems: Sequence[Problem], path: Path, machine: str) -> None:
    """Write the picture, unless nothing was measured."""
    timed = [problem for problem in problems if any(row.rounds for row in problem.rows)]
    measured = [problem for problem in problems if any(row.peak_bytes is not None for row in problem.rows)]
    panels = bool(timed) + bool(measured)
    if not panels:
        return
    bars = max(sum(len(problem.rows) + 1 for problem in timed), 8)
    figure = Figure(figsize=(8.2 * panels, 1.8 + 0.48 * bars))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    if timed:
        _times(timed, axes[0])
    if measured:
        _memory(measured[-1], axes[-1])
    comparison = problems[0].comparison
    title = f"Training step of a classification head on {machine}"
    figure.suptitle(f"{title}, {comparison.objective.title}, {comparison.dtype}")
    figure.savefig(path, dpi=130)


def _lines(name: str) -> str:
    return name.replace(" + ", "\n+ ")


def _finish(axis: Axes, longest: float) -> None:
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * longest)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False)


def _times(problems: list[Problem], axis: Axes) -> None:
    """One group of bars for each N."""
    places, labels, place, longest = [], [], 0.0, 0.0
    for problem in problems:
        places.append(place)
        labels.append(f"N = {problem.shape.rows:,}")
        for row in problem.rows:
            place += 1
            median = row.median
            places.append(place)
            labels.append(_lines(row.name))
            if median is None:
                axis.text(0, place, " not timed", va="center", fontsize=9)
                continue
            begin = 0.0
            for name, color in PHASES.items():
                label = name if name not in axis.get_legend_handles_labels()[1] else None
                length = 1e3 * getattr(median, name)
                axis.barh(place, length, left=begin, color=color, label=label)
                begin += length
            longest = max(longest, begin)
            value = problem.ratio(row.name)
            factor = "" if row.name == IN_BACKWARD or value is None else f" ({value:.2f}×)"
            text = f" {begin:,.3g} ms" if begin < 100 else f" {begin:,.0f} ms"
            axis.text(begin, place, text + factor, va="center", fontsize=9)
        place += 1
    axis.set_yticks(places, labels, fontsize=8)
    for tick, label in zip(axis.get_yticklabels(), labels, strict=True):
        if label.startswith("N = "):
            tick.set(fontweight="bold", fontsize=10)
    shape = problems[0].shape
    axis.set_title(f"Time of one step, C = {shape.classes:,}, D = {shape.dim:,}", fontsize=11)
    axis.set_xlabel("ms (× time of ours, step in backward)")
    _finish(axis, longest)


def _memory(problem: Problem, axis: Axes) -> None:
    """Class weights, momentum, and everything else at the peak of a step."""
    shape = problem.shape
    matrix = problem.itemsize * shape.classes * shape.dim
    bars: list[tuple[str, int, str | None]] = [
        (_lines(row.name), row.peak_bytes, None) for row in problem.rows if row.peak_bytes is not None
    ]
    if problem.itemsize == FP32:
        bars.append((PARTIALFC, partialfc_bytes(shape) - 2 * matrix, "//"))
    parts = {"class weights": WEIGHTS, "momentum": MOMENTUM, "everything else at the peak": REST}
    for place, (_, rest, hatch) in enumerate(bars):
        begin = 0.0
        for (name, color), count in zip(parts.items(), (matrix, matrix, rest), strict=True):
            axis.barh(
                place, count / 1e9, 0.55, left=begin, color=color, hatch=hatch, edgecolor="white" if hatch else None,
                linewidth=0, label=None if place else name,
            )  # fmt: skip
            begin += count / 1e9
        axis.text(begin, place, f" {begin:.2f} GB" if begin >= 0.1 else f" {begin:.2g} GB", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    axis.set_title(f"Peak memory of one step, N = {shape.rows:,}", fontsize=11)
    axis.set_xlabel("GB")
    _finish(axis, max(2 * matrix + rest for _, rest, _ in bars) / 1e9)

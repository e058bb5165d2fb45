"""The tables of `fused-margin compare`: Markdown, and text for a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from .config import RANDOM

FAR = 1e-3
MEASURES = {
    "accuracy": "verification accuracy, %",
    "tar": "TAR at FAR = 1e-3, %",
    "rank1": "rank-1, %",
    "sep_mean": "Sep mean",
    "sep_std": "Sep std",
}
# 1: higher is better. -1: lower is better, because class weights are further apart.
BETTER = {"accuracy": 1, "tar": 1, "rank1": 1, "sep_mean": -1}
PERCENT = ("accuracy", "tar", "rank1")
STEP_TIME = "ms per step"
HEADING_WIDTH = 12  # longer column headings are wrapped


def table(
    rows: dict[str, list[dict[str, float]]], step_ms: dict[str, float | None]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines. Numbers are means over the seeds, with standard deviations if there are several seeds."""
    lines = []
    for loss, seeds in rows.items():
        line = [loss]
        for name in MEASURES:
            factor, digits = (100, 2) if name in PERCENT else (1, 3)
            mean, std = mean_std([factor * measured[name] for measured in seeds])
            line.append(f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}"))
        lines.append([*line, "" if step_ms[loss] is None else f"{step_ms[loss]:.1f}"])
    return ["loss", *MEASURES.values(), STEP_TIME], lines


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation if there are several values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def clear_best(rows: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """The best loss of a measure, by the measure, where the difference to every other loss is beyond the spread.

    Beyond the spread: larger than the sum of both standard deviations over the seeds, so with several seeds only. The
    untrained network is not ranked, and neither are measures without a better direction.
    """
    best = {}
    for measure, direction in BETTER.items():
        results = {
            loss: mean_std([direction * measured[measure] for measured in seeds])
            for loss, seeds in rows.items()
            if loss != RANDOM
        }
        for loss, (mean, std) in results.items():
            others = [result for name, result in results.items() if name != loss]
            if others and all(_is_beyond_spread(mean - other, std, other_std) for other, other_std in others):
                best[measure] = loss
    return best


def _is_beyond_spread(difference: float, *deviations: float | None) -> bool:
    known = [deviation for deviation in deviations if deviation is not None]
    return len(known) == len(deviations) and difference > sum(known)


def screen_table(header: list[str], lines: list[list[str]]) -> str:
    """The table for a screen of 80 columns, with the name of each loss on the line above its numbers."""
    headings = [textwrap.wrap(name, HEADING_WIDTH) for name in header[1:]]
    height = max(map(len, headings))
    rows = [list(row) for row in zip(*([""] * (height - len(words)) + words for words in headings), strict=True)]
    names = [""] * height + [name for name, *_ in lines]
    rows += [[cell.replace(" ± ", "±") for cell in cells] for _, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    written = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"{name}\n{row}" if name else row for name, row in zip(names, written, strict=True))


def unresolved_note(rows: dict[str, list[dict[str, float]]]) -> str:
    """A note if there are too few impostors for the FAR of the table; otherwise empty."""
    # Results of older versions have no such entries.
    few = {run["impostors"] for seeds in rows.values() for run in seeds if not run.get("far_resolved", True)}
    if not few:
        return ""
    pairs = " or ".join(f"{number:,}" for number in sorted(few))
    return f"TAR at FAR = {FAR:g} allows no false accept, because there are only {pairs} impostor pairs."


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """The table in Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))

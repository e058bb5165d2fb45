"""The tables of `fused-margin compare`: Markdown, and text for a screen."""

from __future__ import annotations

import textwrap

import numpy as np

FAR = 1e-3
MEASURES = {
    "accuracy": "verification accuracy, %",
    "tar": "TAR at FAR = 1e-3, %",
    "rank1": "rank-1, %",
    "sep_mean": "Sep mean",
    "sep_std": "Sep std",
}
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
            values = np.array([measured[name] for measured in seeds])
            values, digits = (100 * values, 2) if name in PERCENT else (values, 3)
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            line.append(f"{values.mean():.{digits}f}{deviation}")
        lines.append([*line, "" if step_ms[loss] is None else f"{step_ms[loss]:.1f}"])
    return ["loss", *MEASURES.values(), STEP_TIME], lines


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

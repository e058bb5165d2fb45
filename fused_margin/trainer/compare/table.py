"""The tables of `fused-margin compare`: Markdown, and text for a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RANDOM = "random-weights"  # the network before training
FAR = 1e-3
DIR_FAR = 1e-2


class Measure(NamedTuple):
    """A column of the table."""

    key: str  # in the results of a run
    heading: str
    title: str = ""  # of its chart; empty: none
    label: str = ""  # of the values in the chart
    better: int = 1  # 1: higher is better. -1: lower is better. 0: neither
    is_percent: bool = True

    def text(self, value: float) -> str:
        """A mean or a standard deviation as in the table."""
        return f"{100 * value:.2f}" if self.is_percent else f"{value:.3f}"


MEASURES = (
    Measure("accuracy", "verification accuracy, %", "Verification accuracy", "%, higher is better"),
    Measure("tar", "TAR at FAR = 1e-3, %", "TAR at FAR = 1e-3", "%, higher is better"),
    Measure("rank1", "rank-1, %", "Rank-1 rate", "%, higher is better"),
    Measure("dir", "DIR at FAR = 1 %, %", "Open-set identification: DIR at FAR = 1 %", "%, higher is better"),
    # Lower is better, because class weights are further apart.
    Measure("sep_mean", "Sep mean", "Sep mean", "cosine to the nearest other class, lower is further apart", -1, False),
    Measure("sep_std", "Sep std", better=0, is_percent=False),
)  # of test identities, if there are no benchmarks
STEP_TIME = "ms per step"
HEADING_WIDTH = 12  # longer column headings are wrapped between words
Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # results of each seed by loss


def table(
    rows: Rows, step_ms: Mapping[str, float | None] | None, measures: Sequence[Measure] = MEASURES
) -> tuple[list[str], list[list[str]]]:
    """Header and lines. Numbers are means over the seeds, with standard deviations if there are several seeds.

    Args:
        step_ms: milliseconds of a step by loss; None: no such column.
    """
    lines = []
    for loss, seeds in rows.items():
        line = [loss]
        for measure in measures:
            if not (values := measured_values(seeds, measure)):
                line.append("")
                continue
            mean, std = mean_std(values)
            line.append(measure.text(mean) + ("" if std is None else f" ± {measure.text(std)}"))
        if step_ms is not None:
            line.append("" if step_ms[loss] is None else f"{step_ms[loss]:.1f}")
        lines.append(line)
    return ["loss", *(measure.heading for measure in measures), *([] if step_ms is None else [STEP_TIME])], lines


def measured_values(seeds: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """The values of a measure that are known. Losses without class weights have no Sep."""
    return [value for measured in seeds if (value := measured[measure.key]) is not None]


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation if there are several values."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def clear_best(rows: Rows, measures: Sequence[Measure] = MEASURES) -> dict[str, str]:
    """The best loss of a measure, by the measure's key, where the difference to every other loss is beyond the spread.

    Beyond the spread: larger than the sum of both standard deviations over the seeds, so with several seeds only. The
    untrained network is not ranked, and neither are measures without a better direction.
    """
    best = {}
    for measure in measures:
        if not measure.better:
            continue
        results = {
            loss: mean_std([measure.better * value for value in values])
            for loss, seeds in rows.items()
            if loss != RANDOM and (values := measured_values(seeds, measure))
        }
        for loss, (mean, std) in results.items():
            others = [result for name, result in results.items() if name != loss]
            if others and all(_is_beyond_spread(mean - other, std, other_std) for other, other_std in others):
                best[measure.key] = loss
    return best


def _is_beyond_spread(difference: float, *deviations: float | None) -> bool:
    known = [deviation for deviation in deviations if deviation is not None]
    return len(known) == len(deviations) and difference > sum(known)


def screen_table(header: list[str], lines: list[list[str]]) -> str:
    """The table for a screen of 80 columns, with the name of each loss on the line above its numbers."""
    headings = [textwrap.wrap(name, HEADING_WIDTH, break_long_words=False) for name in header[1:]]
    height = max(map(len, headings))
    rows = [list(row) for row in zip(*([""] * (height - len(words)) + words for words in headings), strict=True)]
    names = [""] * height + [name for name, *_ in lines]
    rows += [[cell.replace(" ± ", "±") for cell in cells] for _, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    written = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"{name}\n{row}" if name else row for name, row in zip(names, written, strict=True))


def unresolved_note(rows: Rows, measures: Sequence[Measure] = MEASURES) -> str:
    """A note if there are too few impostors or unknown images for a FAR of the table; otherwise empty."""
    notes = []
    for benchmark in (measure.key.removesuffix("tar") for measure in measures if measure.key.endswith("tar")):
        # Results of older versions have no such entries.
        resolved, impostors = f"{benchmark}far_resolved", f"{benchmark}impostors"
        few = {run[impostors] for seeds in rows.values() for run in seeds if not run.get(resolved, True)}
        if few:
            pairs = " or ".join(f"{number:,}" for number in sorted(few))
            rate = f"The TAR of {benchmark.removesuffix('/')}" if benchmark else f"TAR at FAR = {FAR:g}"
            notes.append(f"{rate} allows no false accept, because there are only {pairs} impostor pairs.")
    for benchmark in (measure.key.removesuffix("dir") for measure in measures if measure.key.endswith("dir")):
        resolved, unknown = f"{benchmark}dir_resolved", f"{benchmark}unknown_probes"
        if few := {run[unknown] for seeds in rows.values() for run in seeds if not run.get(resolved, True)}:
            probes = " or ".join(f"{number:,}" for number in sorted(few))
            notes.append(f"The DIR accepts no unknown image, because there are only {probes} of them.")
    return " ".join(notes)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """The table in Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))

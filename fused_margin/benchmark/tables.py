"""The table that the benchmark prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from .heads import IN_BACKWARD
from .results import Problem, held_per_class

ABSENT = "–"


def mebibytes(count: int | None) -> str:
    return ABSENT if count is None else f"{count / 2**20:,.0f}"


def milliseconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def step_table(problem: Problem) -> Table:
    """Time of the whole step and of its phases, and memory; one row per contestant."""
    shape = problem.shape
    comparison = problem.comparison
    table = Table(
        title=f"training step of a head, {comparison.objective.title}, {comparison.dtype}, {shape.label}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="phases of the round with the median time; ratio: time over ours, step in backward, median over rounds;\n"
        "peak above class weights and momentum, which take "
        f"{held_per_class(shape.dim, problem.itemsize):,} bytes per class as counted",
    )
    table.add_column("contestant", min_width=20)
    for heading in ("step ms", "for-\nward", "back-\nward", "opti-\nmizer", "ratio", "peak\nMiB", "bytes/\nclass"):
        table.add_column(heading, justify="right", min_width=5)
    for row in [*problem.rows, problem.alone]:
        name = row.name.replace(" + SGD", "\n+ SGD")
        median = row.median
        if median is None:
            table.add_row(f"{name}\n{row.failure or 'not reached'}", style="yellow")
            continue
        value = problem.ratio(row.name)
        table.add_row(
            name + (f"\n{row.variant}" if row.variants else ""),
            *(milliseconds(1e3 * seconds) for seconds in (median.whole, *median)),
            ABSENT if value is None else f"{value:.2f}×",
            row.failure or mebibytes(row.peak_bytes),
            ABSENT if row.held_bytes is None else f"{row.held_bytes / shape.classes:,.0f}",
            style="bold" if row.name == IN_BACKWARD else None,
        )
    return table

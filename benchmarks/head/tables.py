"""Tables that the study prints."""

from __future__ import annotations

import statistics

from rich.table import Table

from ..comparison.tables import ABSENT, mebibytes, milliseconds
from .contestants import IN_BACKWARD
from .results import BF16, FP32, FUSED, Problem, Study, held_per_class


def step_table(problem: Problem) -> Table:
    """Time of the whole step and of its phases, and memory; one row per contestant."""
    shape = problem.shape
    counted = held_per_class(shape.dim, FP32)
    table = Table(
        title=f"training step of a head, fp32, {shape.label}",
        caption="phases of the round with the median time; ratio: time over ours, step in backward, median over rounds;\n"
        f"peak above class weights and momentum; weights and momentum take {counted:,} bytes per class as counted in "
        f"fp32, {held_per_class(shape.dim, BF16):,} in bf16",
    )
    table.add_column("contestant")
    for heading in ("step ms", "forward", "backward", "optimizer", "ratio", "peak MiB", "bytes per class"):
        table.add_column(heading, justify="right")
    for row in [*problem.rows, problem.alone]:
        median = row.median
        if median is None:
            table.add_row(row.name, row.failure or "not reached", style="yellow")
            continue
        value = problem.ratio(row.name)
        table.add_row(
            row.name + (f"\n  {row.variant}" if row.variants else ""),
            *(milliseconds(1e3 * seconds) for seconds in (median.whole, *median)),
            ABSENT if value is None else f"{value:.2f}×",
            row.failure or mebibytes(row.peak_bytes),
            ABSENT if row.held_bytes is None else f"{row.held_bytes / shape.classes:,.0f}",
            style="bold" if row.name == IN_BACKWARD else None,
        )
    return table


def optimizer_table(study: Study) -> Table:
    table = Table("optimizer", title="step by a gradient that exists")
    table.add_column("median ms", justify="right")
    table.add_column(f"over {FUSED}", justify="right")
    reference = study.optimizers[FUSED]
    for name, seconds in study.optimizers.items():
        value = statistics.median(mine / theirs for mine, theirs in zip(seconds, reference, strict=True))
        table.add_row(name, milliseconds(1e3 * statistics.median(seconds)), f"{value:.2f}×")
    return table

"""Tables that the study prints."""

from __future__ import annotations

import statistics

from rich.table import Table

from fused_margin.benchmark.tables import milliseconds

from .results import FUSED, Study


def optimizer_table(study: Study) -> Table:
    table = Table("optimizer", title="step by a gradient that exists")
    table.add_column("median ms", justify="right")
    table.add_column(f"over {FUSED}", justify="right")
    reference = study.optimizers[FUSED]
    for name, seconds in study.optimizers.items():
        value = statistics.median(mine / theirs for mine, theirs in zip(seconds, reference, strict=True))
        table.add_row(name, milliseconds(1e3 * statistics.median(seconds)), f"{value:.2f}×")
    return table

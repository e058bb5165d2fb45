"""Tables that a run prints."""

from __future__ import annotations

from rich.table import Table

from fused_margin.benchmark.tables import ABSENT, mebibytes, milliseconds
from fused_margin.benchmark.timing import quartiles

from ..kernels import names
from .edges import Check
from .report import Entry, Section, Verdict


def _error(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1e}"


def table_of(section: Section) -> Table:
    """The table of a section, by its suite."""
    if section.suite == "memory":
        return memory_table([section])
    if section.suite == names.MACHINE:
        return machine_table(section)
    return accuracy_table(section) if section.suite == "accuracy" else time_table(section)


def time_table(section: Section) -> Table:
    """Time, ratio, memory and error; one row per contestant."""
    of_kernels = section.suite in names.KERNELS
    reference = names.CUBLAS if of_kernels else "ours with the same loss"
    table = Table(title=section.title, caption=f"ratio: time over the time of {reference}, median over rounds")
    table.add_column("contestant", no_wrap=True)
    table.add_column("setting")
    error = "error" if of_kernels else "gradient error"
    for heading in ("median ms", "quartiles", "ratio", "peak extra MiB", error):
        table.add_column(heading, justify="right")
    for entry in section.entries:
        if not entry.seconds:
            table.add_row(entry.name, entry.failure or "not reached", style="yellow")
            continue
        lower, median, upper = (1e3 * value for value in quartiles(entry.seconds))
        ratio = section.ratio(entry.name, entry.reference)
        table.add_row(
            entry.name,
            entry.variant,
            milliseconds(median),
            f"{milliseconds(lower)} … {milliseconds(upper)}",
            ABSENT if ratio is None else f"{ratio:.2f}×",
            entry.failure or mebibytes(entry.peak_bytes),
            _error(entry.largest_error if of_kernels else entry.gradient_error),
            style="bold" if entry.name == entry.reference else None,
        )
    return table


def machine_table(section: Section) -> Table:
    """Bytes or operations per second, in units of 10¹²."""
    table = Table("measured", "setting", title=section.title)
    for heading in ("median ms", "TB/s or TFLOP/s"):
        table.add_column(heading, justify="right")
    for entry in section.entries:
        if entry.rate is None:
            table.add_row(entry.name, entry.failure or "not reached", style="yellow")
        else:
            median = 1e3 * quartiles(entry.seconds)[1]
            table.add_row(entry.name, entry.variant, milliseconds(median), f"{entry.rate / 1e12:,.3g}")
    return table


def memory_table(sections: list[Section]) -> Table:
    """Peak extra memory; one row per contestant, one column per number of classes."""
    shape = sections[0].shape
    table = Table(title=f"peak extra memory of a step, MiB, N={shape.rows:,}, D={shape.dim:,}")
    table.add_column("contestant", no_wrap=True)
    for section in sections:
        table.add_column(f"C={section.shape.classes:,}", justify="right")
    for name in dict.fromkeys(entry.name for section in sections for entry in section.entries):
        table.add_row(name, *(_memory(section.find(name)) for section in sections))
    return table


def _memory(entry: Entry | None) -> str:
    if entry is None:
        return ABSENT
    return entry.failure or mebibytes(entry.peak_bytes)


def accuracy_table(section: Section) -> Table:
    table = Table(title=f"relative error against float64, {section.shape.label}")
    table.add_column("contestant", no_wrap=True)
    for heading in ("loss", "dX", "dW"):
        table.add_column(heading, justify="right")
    for entry in section.entries:
        if entry.failure:
            table.add_row(entry.name, entry.failure, style="yellow")
        else:
            keys = ("loss", "embeddings", "weight")
            table.add_row(entry.name, *(_error(entry.errors.get(key)) for key in keys))
    return table


def check_table(checks: list[Check]) -> Table:
    table = Table("case", title="edge cases")
    for heading in ("measured", "bound", "passed?"):
        table.add_column(heading, justify="right")
    for check in checks:
        table.add_row(check.case, f"{check.measured:.1e}", f"{check.bound:.0e}", _yes_or_no(check.passed))
    return table


def target_table(verdicts: list[Verdict]) -> Table:
    table = Table("goal", "target", title="targets")
    table.add_column("measured", justify="right")
    table.add_column("met?", justify="right")
    for verdict in verdicts:
        table.add_row(verdict.goal, verdict.target, verdict.measured, _yes_or_no(verdict.met))
    return table


def _yes_or_no(answer: bool | None) -> str:
    if answer is None:
        return ABSENT
    return "[green]yes[/]" if answer else "[red]no[/]"

"""Figure of a run: bars of times, and peak memory over the number of classes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from fused_margin.benchmark.environment import machine_name
from fused_margin.benchmark.figure import FLOOR, OURS, PEER
from fused_margin.benchmark.timing import quartiles

from ..kernels import names
from . import peers
from .report import Report, Section

# The Okabe-Ito colors, which color-blind readers can distinguish.
LINES = ("#d55e00", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#8c6d31")
MARKERS = "sD^vP*X"


def draw(report: Report, path: Path) -> None:
    """Write the figure, unless the run measured neither time nor memory."""
    timed = [
        section
        for section in report.sections
        if section.suite != names.MACHINE and any(entry.seconds for entry in section.entries)
    ]
    memory = [section for section in report.of("memory") if _measured(section)]
    panels = len(timed) + bool(memory)
    if not panels:
        return
    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure = Figure(figsize=(7.2 * columns, 4.4 * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for section, axis in zip(timed, axes, strict=False):
        _bars(section, axis)
    if memory:
        _lines(memory, axes[len(timed)])
    for axis in axes[panels:]:
        axis.remove()
    only_fp32 = not any(section.suite in names.SUITES for section in report.sections)
    figure.suptitle(f"fused_margin on {machine_name(report.device, report.threads)}{', fp32' if only_fp32 else ''}")
    figure.savefig(path, dpi=130)


def _measured(section: Section) -> bool:
    return any(entry.peak_bytes is not None for entry in section.entries)


def _color(name: str, objective: str) -> str:
    if objective == "products":
        return FLOOR
    return OURS if name.startswith("ours") else PEER


def _bars(section: Section, axis: Axes) -> None:
    """Median and quartiles of every contestant, the fastest at the top."""
    entries = [entry for entry in section.entries if entry.seconds]
    entries.sort(key=lambda entry: quartiles(entry.seconds)[1], reverse=True)
    for place, entry in enumerate(entries):
        lower, median, upper = (1e3 * value for value in quartiles(entry.seconds))
        axis.barh(
            place,
            median,
            xerr=[[median - lower], [upper - median]],
            color=_color(entry.name, entry.objective),
            ecolor="#333333",
            capsize=2,
        )
        ratio = section.ratio(entry.name, entry.reference)
        label = f" {median:,.3g} ms" if median < 100 else f" {median:,.0f} ms"
        if ratio is not None and entry.name != entry.reference:
            label += f" ({ratio:.2f}×)"
        axis.text(upper, place, label, va="center", fontsize=9)
    labels = [f"{entry.name} *" if entry.objective == "normface" else entry.name for entry in entries]
    axis.set_yticks(range(len(entries)), labels)
    axis.set_xlim(right=1e3 * max(quartiles(entry.seconds)[2] for entry in entries) * 1.5)
    axis.set_title(section.title, fontsize=10)
    starred = any(entry.objective == "normface" for entry in entries)
    unit = f"ms (× {names.CUBLAS})" if section.suite in names.KERNELS else "ms (× ours)"
    axis.set_xlabel(unit + ("      * normalized softmax, no margin" if starred else ""))
    axis.spines[["top", "right"]].set_visible(False)


def _lines(sections: list[Section], axis: Axes) -> None:
    """Peak extra memory of every contestant, on logarithmic axes."""
    contestants = dict.fromkeys(entry.name for section in sections for entry in section.entries)
    others = [name for name in contestants if not name.startswith("ours")]
    for name in contestants:
        found = [(section.shape.classes, section.find(name)) for section in sections]
        points = [(classes, entry.peak_bytes / 2**20) for classes, entry in found if entry and entry.peak_bytes]
        if not points:
            continue
        if name in others:
            place = others.index(name)
            style = {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)]}
        else:
            dash = {peers.OURS: "-", peers.OURS_SMALL: "--"}.get(name, ":")
            style = {"color": OURS, "marker": "o", "linewidth": 2.5, "linestyle": dash}
        missing = [f"{classes:,}" for classes, entry in found if entry and entry.failure]
        label = f"{name}\n(does not fit: {', '.join(missing)})" if missing else name
        axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set(xscale="log", yscale="log", xlabel="classes C", ylabel="MiB")
    classes = [section.shape.classes for section in sections]
    axis.set_xticks(classes, [f"{count:,}" for count in classes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    shape = sections[0].shape
    axis.set_title(f"Peak memory beyond weights and gradients\nN={shape.rows:,}, D={shape.dim:,}", fontsize=10)
    axis.grid(which="major", alpha=0.3)
    axis.set_ylim(top=axis.get_ylim()[1] * 40)  # room for the legend above the lines
    axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    axis.spines[["top", "right"]].set_visible(False)

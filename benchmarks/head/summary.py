"""The picture of README.md and of the documentation: one step of a head, time and memory beside the peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fused_margin.benchmark.heads import IN_BACKWARD, STORED

from ..common.files import ROOT

PICTURE = ROOT / "docs" / "images" / "head.png"
SAMPLES = 128
OURS, PEERS = "#0b6e99", "#b3bac0"
LABELS = {
    IN_BACKWARD: "fused_margin,\nstep in the backward",
    STORED: "fused_margin,\nordinary step",
}


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the problem with N = SAMPLES of a result of the study."""
    (problem,) = [each for each in content["problems"] if each["shape"]["rows"] == SAMPLES]
    rows = [row for row in problem["contestants"] if row["median"] and row["peak_bytes"] is not None]
    shape, names = problem["shape"], [row["name"] for row in rows]
    peaks = [row["peak_bytes"] / 2**20 for row in rows]
    panels = {
        "Time of one step, ms": ([1e3 * row["median"]["whole"] for row in rows], [row["ratio"] for row in rows]),
        "Memory above weights and momentum, MiB": (peaks, [peak / peaks[0] for peak in peaks]),
    }
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axis, (title, (values, ratios)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        axis.barh(range(len(rows)), values, 0.62, color=[OURS if name in LABELS else PEERS for name in names])
        for place, (value, ratio) in enumerate(zip(values, ratios, strict=True)):
            factor = "" if place == 0 else f"   {ratio:.3g}×"
            axis.text(value, place, f" {value:,.0f}{factor}", va="center", fontsize=11)
        axis.set_title(title, fontsize=12, loc="left")
        axis.set_yticks(
            range(len(rows)), [LABELS.get(name, name.replace(" + ", "\n+ ")) for name in names], fontsize=10
        )
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        f"Classification head of {shape['classes']:,} classes, D = {shape['dim']}, N = {shape['rows']}, float32, "
        f"{content['hardware']['cpu']}, {content['threads']} cores",
        fontsize=11, color="#5b666e",
    )  # fmt: skip
    figure.savefig(path, dpi=110)

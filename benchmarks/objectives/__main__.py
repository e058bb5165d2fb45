"""Draws the comparison of training objectives. `python -m benchmarks.objectives`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fused_margin.trainer.compare.table import MEASURES, RANDOM

from ..common.files import RESULTS, ROOT

PICTURE = ROOT / "docs" / "images" / "objectives.png"
RESULT = "objectives-{}.json"
DATA = {"glyphs": "glyphs: characters of fonts", "digits": "digits"}
SHOWN = ("accuracy", "rank1", "dir")  # measures
MEAN, SEED = "#0b6e99", "#9fb8c4"


def main() -> None:
    results = {data: json.loads((RESULTS / RESULT.format(data)).read_text(encoding="utf-8")) for data in DATA}
    draw(results, PICTURE)
    print(f"wrote {PICTURE}")


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a column of each measure, and a row of each objective, with its mean and its seeds, for each data set."""
    measures = {measure.key: measure.heading for measure in MEASURES if measure.key in SHOWN}
    figure = Figure(figsize=(12, 0.6 + 0.26 * sum(len(result["losses"]) for result in results.values())))
    figure.set_layout_engine("constrained")
    heights = [len(result["losses"]) for result in results.values()]
    axes = figure.subplots(len(results), len(measures), gridspec_kw={"height_ratios": heights}, squeeze=False)
    for row, (data, result) in zip(axes, results.items(), strict=True):
        names = list(result["losses"])
        names.sort(key=lambda name: (name == RANDOM, -mean(result, name, "accuracy")))
        for axis, (key, heading) in zip(row, measures.items(), strict=True):
            for place, name in enumerate(names):
                seeds = [100 * seed[key] for seed in result["losses"][name]["seeds"]]
                axis.plot(seeds, [place] * len(seeds), "o", color=SEED, markersize=4)
                axis.plot([np.mean(seeds)], [place], "|", color=MEAN, markersize=13, markeredgewidth=2.5)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_yticks(range(len(names)), names if axis is row[0] else [], fontsize=9)
            axis.set_title(f"{DATA[data]}\n{heading}" if axis is row[0] else f"\n{heading}", loc="left", fontsize=10)
            axis.grid(axis="both", color="#e6eaec")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
    figure.savefig(path, dpi=100)


def mean(result: dict[str, Any], name: str, key: str) -> float:
    return float(np.mean([seed[key] for seed in result["losses"][name]["seeds"]]))


if __name__ == "__main__":
    main()

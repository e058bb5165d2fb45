"""Draws the panels of `fused-margin figure`: embeddings as points, class weights as rays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.preprocessing import normalize

from ..evaluate.figures import INK, MUTED, STYLE

COLUMNS = 4
PANEL_INCHES = 3.3


class Geometry(NamedTuple):
    """Accuracy, and angles in degrees between embeddings and class weights."""

    accuracy: float
    to_own_class: float  # mean angle between an embedding and its class weight
    between_classes: float  # smallest angle between two class weights


class DrawnPanel(NamedTuple):
    """Embeddings and class weights of a loss."""

    title: str
    train: np.ndarray  # (num_train, 2) embeddings
    train_labels: np.ndarray
    test: np.ndarray  # (num_test, 2)
    test_labels: np.ndarray
    class_weight: np.ndarray  # (num_classes, 2)
    geometry: Geometry  # of the held-out images


def draw_panels(
    path: Path, title: str, panels: Sequence[DrawnPanel], names: Sequence[str], colors: Sequence[str]
) -> None:
    """Write the panels to `path`; classes have `names` and `colors` (num_classes,)."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        width = PANEL_INCHES * columns
        figure = Figure(
            figsize=(max(width, 2 * PANEL_INCHES), 0.9 + (PANEL_INCHES + 0.75) * rows), layout="constrained"
        )
        # Panels are two cells wide, so that a shorter last row is centerd.
        grid = figure.add_gridspec(rows, 2 * columns)
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            left = 2 * column + (rows * columns - len(panels) if row == rows - 1 else 0)
            _draw_panel(figure.add_subplot(grid[row, left : left + 2]), panel, colors)
        marks = [
            Line2D([], [], color=color, marker="o", linestyle="-", markersize=5, label=f"digit {name}")
            for name, color in zip(names, colors, strict=True)
        ]
        marks.append(Line2D([], [], color=MUTED, marker="o", linestyle="", markersize=5, label="held-out image"))
        marks.append(Line2D([], [], color=MUTED, marker=".", linestyle="", markersize=3, label="training image"))
        marks.append(Line2D([], [], color=MUTED, linewidth=2, label="class weight"))
        figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 2 * columns))
        figure.suptitle(title, fontsize=13, color=INK)
        figure.savefig(path, dpi=150)


def _draw_panel(axes: Axes, panel: DrawnPanel, colors: Sequence[str]) -> None:
    reach = 1.08 * max(np.abs(panel.train).max(), np.abs(panel.test).max())
    rays = normalize(panel.class_weight) * 1.5 * reach  # clipped at the frame
    for label, (color, ray) in enumerate(zip(colors, rays, strict=True)):
        axes.plot([0, ray[0]], [0, ray[1]], color=color, linewidth=2, alpha=0.9, zorder=1)
        axes.plot(*panel.train[panel.train_labels == label].T, ".", color=color, markersize=2, alpha=0.5, zorder=2)
        axes.plot(
            *panel.test[panel.test_labels == label].T,
            "o",
            color=color,
            markersize=4,
            alpha=0.7,
            markeredgecolor="white",
            markeredgewidth=0.3,
            zorder=3,
        )
    axes.plot(0, 0, "+", color=INK, markersize=7, zorder=4)
    accuracy, own, between = panel.geometry
    numbers = f"accuracy {accuracy:.1%}\nto own class {own:.1f}°, between classes {between:.1f}°"
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(numbers, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8, length=0, colors=MUTED)

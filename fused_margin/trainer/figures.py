"""The picture of a run: ROC, separability histogram and loss curve."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluate import Evaluation

INK, ACCENT, MUTED = "#1f3b57", "#d1495b", "#9aa7b4"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e3e7eb",
    "legend.frameon": False,
}


def draw_report(path: Path, title: str, evaluation: Evaluation, far: float, losses: list[float], epochs: int) -> None:
    """Write the three panels to `path`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        axes = figure.subplots(1, 3)
        _draw_roc(axes[0], evaluation, far)
        _draw_separability(axes[1], evaluation)
        _draw_loss(axes[2], losses, epochs)
        figure.suptitle(title, fontsize=12, color=INK)
        figure.savefig(path, dpi=120)


def _draw_roc(axes: Axes, evaluation: Evaluation, far: float) -> None:
    smallest = 1 / max(1, evaluation.num_pairs // 2)  # one false accept among the unlike pairs
    curve = evaluation.roc
    shown = np.maximum(curve.far, smallest / 2)  # so that the part without false accepts shows
    axes.plot(shown, curve.tar, color=INK, linewidth=2, drawstyle="steps-post")
    diagonal = np.geomspace(smallest / 2, 1, 100)
    axes.plot(diagonal, diagonal, color=MUTED, linestyle="--", linewidth=1, label="chance")
    axes.plot(
        max(far, smallest / 2),
        evaluation.tar,
        "o",
        color=ACCENT,
        label=f"TAR {evaluation.tar:.1%} at FAR {far:g}",
    )
    axes.set(
        title=f"Verification, AUC {evaluation.auc:.4f}",
        xlabel="false accept rate (FAR)",
        ylabel="true accept rate (TAR)",
        xscale="log",
        xlim=(smallest / 2, 1),
        ylim=(0, 1.02),
    )
    axes.legend(loc="best")


def _draw_separability(axes: Axes, evaluation: Evaluation) -> None:
    mean, std = evaluation.separability
    axes.hist(evaluation.nearest_cosine, bins=60, color=INK, alpha=0.85)
    axes.axvline(mean, color=ACCENT, linewidth=2, label=f"mean {mean:.3f}, std {std:.3f}")
    axes.set(
        title="Separability of the class weights",
        xlabel="cosine to the nearest other class",
        ylabel="classes",
    )
    axes.margins(y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")


def _draw_loss(axes: Axes, losses: list[float], epochs: int) -> None:
    values = np.array(losses)
    steps = np.arange(1, len(values) + 1)
    window = max(1, len(values) // 50)
    axes.plot(steps, values, color=MUTED, linewidth=0.7, alpha=0.7, label="each step")
    if window > 1:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=INK, linewidth=2, label=f"mean of {window}")
    axes.set(
        title="Training loss",
        xlabel=f"step ({epochs} epoch{'s' if epochs > 1 else ''})",
        ylabel="loss",
        xlim=(0, len(values) + 1),
    )
    axes.legend(loc="upper right")

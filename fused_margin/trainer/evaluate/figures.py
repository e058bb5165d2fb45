"""Figures of a training and of an evaluation: ROC, histograms of scores and separability, loss curve."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fused_margin.evaluation import ScoreSummary
from fused_margin.evaluation.plurals import counted

from .histograms import score_histogram, separability_histogram
from .network import Evaluation

INK, ACCENT, MUTED = "#1f3b57", "#d1495b", "#9aa7b4"
STYLE = matplotlib.RcParams(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "font.size": 10,
        "grid.color": "#e3e7eb",
        "legend.edgecolor": "none",
        "legend.framealpha": 0.9,
    }
)


def draw_report(path: Path, title: str, evaluation: Evaluation, losses: list[float], epochs: int) -> None:
    """Write the figure of a training to `path`: ROC curve (if verified), separability (if known) and loss."""
    verified, nearest_cosine = evaluation.verification, evaluation.nearest_cosine
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(1 + (verified is not None) + (nearest_cosine is not None))
        if verified is not None:
            _draw_roc(axes[0], verified.summary)
        if nearest_cosine is not None:
            _draw_separability(axes[-2], nearest_cosine)
        _draw_loss(axes[-1], losses, epochs)
        _save(figure, path, title)


def draw_evaluation(
    path: Path, title: str, summary: ScoreSummary, nearest_cosine: np.ndarray | None, unit: str = "cosine"
) -> None:
    """Write the figure of an evaluation to `path`: ROC curve, scores in `unit`, and separability (if known)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(2 if nearest_cosine is None else 3)
        _draw_roc(axes[0], summary)
        _draw_scores(axes[1], summary, unit)
        if nearest_cosine is not None:
            _draw_separability(axes[2], nearest_cosine)
        _save(figure, path, title)


def _panels(number: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(5 * number, 4.8), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False)[0]


def _save(figure: Figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=12, color=INK)
    figure.savefig(path, dpi=120)


def _draw_roc(axes: Axes, summary: ScoreSummary) -> None:
    curve, tar = summary.roc, summary.tar
    left = tar.smallest_far / 2  # shows the part without false accepts on the logarithmic axis
    axes.plot(np.maximum(curve.far, left), curve.tar, color=INK, linewidth=2, drawstyle="steps-post")
    diagonal = np.geomspace(left, 1, 100)
    axes.plot(diagonal, diagonal, color=MUTED, linestyle="--", linewidth=1, label="chance")
    label = f"TAR {tar.tar:.1%} at FAR {tar.far:g}"
    if not tar.resolved:
        label += f",\nbelow one false accept ({tar.smallest_far:.1e})"
    axes.plot(max(tar.far, left), tar.tar, "o", color=ACCENT, clip_on=False, label=label)
    axes.set(
        title=f"Verification, AUC {summary.auc:.4f}",
        xlabel="false accept rate (FAR)",
        ylabel="true accept rate (TAR)",
        xscale="log",
        xlim=(left, 1),
        ylim=(0, 1.02),
    )
    axes.legend(loc="center right")


def _draw_scores(axes: Axes, summary: ScoreSummary, unit: str) -> None:
    bins = score_histogram(summary)
    kinds = (("impostor", MUTED, bins.impostor, bins.num_impostor), ("genuine", INK, bins.genuine, bins.num_genuine))
    for name, color, shares, number in kinds:
        axes.stairs(shares, bins.edges, fill=True, color=color, alpha=0.7, label=f"{name}, {number:,} pairs")
    if np.isfinite(summary.tar.threshold):
        label = f"threshold at FAR {summary.tar.far:g}"
        axes.axvline(summary.tar.threshold, color=ACCENT, linewidth=2, label=label)
    axes.set(
        title=f"Scores, equal error rate {summary.equal_error_rate:.2%}",
        xlabel=unit,
        ylabel="share of the pairs",
    )
    axes.margins(y=0.3)
    axes.legend(loc="upper left")


def _draw_separability(axes: Axes, nearest_cosine: np.ndarray) -> None:
    mean, std = nearest_cosine.mean(), nearest_cosine.std()
    axes.stairs(*separability_histogram(nearest_cosine), fill=True, color=INK, alpha=0.85)
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
    marker = "." if len(values) < 20 else None  # shows a single point, which has no line
    axes.plot(steps, values, color=MUTED, linewidth=0.7, alpha=0.7, marker=marker, label="each step")
    if window > 1:
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=INK, linewidth=2, label=f"mean of {window}")
    axes.set(
        title="Training loss",
        xlabel=f"step ({counted(epochs, 'epoch')})",
        ylabel="loss",
        xlim=(0, len(values) + 1),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")

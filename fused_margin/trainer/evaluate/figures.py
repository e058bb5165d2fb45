"""Figures of a training and of an evaluation: ROC, histograms of scores and separability, loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fused_margin.evaluation import OperatingCurve, ScoreSummary
from fused_margin.evaluation.plurals import counted, counted_identities

from .histograms import ScoreHistogram, histogram, score_histogram, separability_histogram
from .measured import Identified
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
        tar = summary.tar
        threshold = (tar.threshold, f"threshold at FAR {tar.far:g}") if np.isfinite(tar.threshold) else None
        _draw_scores(axes[1], score_histogram(summary), ("genuine", "impostor"), threshold)
        axes[1].set(
            title=f"Scores, equal error rate {summary.equal_error_rate:.2%}", xlabel=unit, ylabel="share of the pairs"
        )
        if nearest_cosine is not None:
            _draw_separability(axes[2], nearest_cosine)
        _save(figure, path, title)


def draw_identification(path: Path, title: str, identified: Identified, result: Mapping[str, Any]) -> None:
    """Write the figure of an identification to `path`: CMC and, for an open set, DIR over FAR and scores.

    Args:
        result: of the report.
    """
    at_far, curve = result["dir_at_far"], identified.curve
    with matplotlib.rc_context(STYLE):
        figure, axes = _panels(1 if curve is None else 3)
        _draw_cmc(axes[0], np.array(result["cmc"]), result["gallery"]["identities"])
        if curve is not None:
            _draw_dir(axes[1], curve, at_far)
            bins = histogram(identified.mate_scores, identified.non_mated_scores)
            threshold = at_far["threshold"], f"threshold at FAR {at_far['far']:g}"
            _draw_scores(axes[2], bins, ("known, own identity", "unknown, best identity"), threshold, "probe")
            axes[2].set(title="Scores", xlabel="cosine", ylabel="share of the probes")
        _save(figure, path, title)


def _panels(number: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(max(5 * number, 9), 4.8), layout="constrained")  # one panel is as wide as the title
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


def _draw_scores(
    axes: Axes, bins: ScoreHistogram, names: tuple[str, str], threshold: tuple[float, str] | None, unit: str = "pair"
) -> None:
    """Draw the histograms of two kinds of scores, `names`, each of a number of `unit`."""
    kinds = ((names[1], MUTED, bins.impostor, bins.num_impostor), (names[0], INK, bins.genuine, bins.num_genuine))
    for name, color, shares, number in kinds:
        axes.stairs(shares, bins.edges, fill=True, color=color, alpha=0.7, label=f"{name}, {counted(number, unit)}")
    if threshold is not None:
        axes.axvline(threshold[0], color=ACCENT, linewidth=2, label=threshold[1])
    axes.margins(y=0.3)
    axes.legend(loc="upper left")


def _draw_cmc(axes: Axes, cmc: np.ndarray, identities: int) -> None:
    rank = np.arange(1, len(cmc) + 1)
    axes.plot(rank, cmc, color=INK, linewidth=2, marker=".", label=f"rank-1 {cmc[0]:.1%}")
    axes.set(
        title=f"Closed set, gallery of {counted_identities(identities)}",
        xlabel="rank",
        ylabel="identification rate (CMC)",
        xlim=(0.5, len(cmc) + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")


def _draw_dir(axes: Axes, curve: OperatingCurve, at_far: Mapping[str, Any]) -> None:
    left = at_far["smallest_far"] / 2  # shows the part without false positives on the logarithmic axis
    axes.plot(np.maximum(curve.fpir, left), 1 - curve.fnir, color=INK, linewidth=2, drawstyle="steps-post")
    label = f"DIR {at_far['dir']:.1%} at FAR {at_far['far']:g}"
    if not at_far["far_resolved"]:
        label += f",\nbelow one false positive ({at_far['smallest_far']:.1e})"
    axes.plot(max(at_far["far"], left), at_far["dir"], "o", color=ACCENT, clip_on=False, label=label)
    axes.set(
        title="Open set, rank 1",
        xlabel="false alarm rate (FAR, FPIR)",
        ylabel="detection and identification rate (DIR)",
        xscale="log",
        xlim=(left, 1),
        ylim=(0, 1.02),
    )
    axes.legend(loc="lower right")


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

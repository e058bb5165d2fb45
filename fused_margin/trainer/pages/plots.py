"""The charts of the pages: ROC curve, histograms, curves of a training, and losses with error bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fused_margin.evaluation import ScoreSummary
from fused_margin.evaluation.plurals import counted

from ..evaluate.histograms import ScoreHistogram, score_histogram, separability_histogram
from .charts import (
    BOTTOM,
    RIGHT,
    WIDTH,
    Chart,
    Dot,
    Mark,
    Scale,
    Tick,
    bars_path,
    dots,
    line_marks,
    line_path,
    linear_ticks,
    plot_scales,
    step_path,
    vertical_path,
)

ROC_POINTS = 300
ROW_HEIGHT, ROWS_TOP = 34.0, 4.0  # of a chart of rows
LOGGED = {
    "loss": ("Loss", "loss"),
    "lr": ("Learning rate", "of the backbone"),
    "images_per_second": ("Speed", "images per second"),
    "gradient_norm": ("Gradient norm", "of the backbone, before clipping"),
}  # Title and label of each column of log.csv that has a chart


def roc_chart(summary: ScoreSummary) -> Chart:
    """ROC curve over a logarithmic false accept rate, with the reported TAR."""
    curve, tar = summary.roc, summary.tar
    left = min(tar.smallest_far, tar.far, 0.5) / 2  # shows the part without false accepts
    scales = to_x, to_y = plot_scales((left, 1), (0, 1), log_x=True)
    far = np.geomspace(left, 1, ROC_POINTS)
    reached = curve.tar[np.searchsorted(curve.far, far, side="right") - 1]
    point = np.array([tar.far]), np.array([tar.tar])
    marks = [
        Mark("dashes", "quiet", line_path(to_x(far), to_y(far)), label="chance"),
        Mark("line", "first", step_path(to_x(far), to_y(reached)), label="measured"),
        Mark("dots", "second", dots=dots(*point, scales, ".2%"), label=f"TAR {tar.tar:.2%} at FAR {tar.far:g}"),
    ]
    return Chart(
        "ROC curve",
        f"True accept rate over false accept rate: {tar.tar:.2%} at {tar.far:g}; area under the curve {summary.auc:.4f}.",
        "false accept rate (FAR)",
        "true accept rate (TAR)",
        to_x.ticks,
        to_y.ticks,
        marks,
    )


def score_chart(summary: ScoreSummary, unit: str) -> Chart:
    """Histograms of the scores of genuine and impostor pairs."""
    threshold = (summary.tar.threshold, f"threshold at FAR {summary.tar.far:g}")
    bins = score_histogram(summary)
    return histogram_chart(
        bins,
        (counted(bins.num_genuine, "genuine pair"), counted(bins.num_impostor, "impostor pair")),
        threshold if np.isfinite(summary.tar.threshold) else None,
        f"Histograms of the scores of genuine and impostor pairs; equal error rate {summary.equal_error_rate:.2%}.",
        unit,
        "share of the pairs",
    )


def histogram_chart(
    bins: ScoreHistogram,
    labels: tuple[str, str],
    threshold: tuple[float, str] | None,
    summary: str,
    unit: str,
    share: str,
) -> Chart:
    """Histograms of two kinds of scores.

    Args:
        labels: of the genuine and of the impostor scores.
        threshold: where a line is, and its label.
        summary: what the chart shows in words.
        unit: of the scores.
        share: label of the vertical axis.
    """
    top = 1.08 * max(bins.genuine.max(), bins.impostor.max())
    to_x, to_y = plot_scales((bins.edges[0], bins.edges[-1]), (0, top))
    edges, base = to_x(bins.edges), float(to_y(0))
    marks = [
        Mark("area", "second", bars_path(edges, to_y(bins.impostor), base), label=labels[1]),
        Mark("area", "first", bars_path(edges, to_y(bins.genuine), base), label=labels[0]),
    ]
    if threshold is not None:
        marks.append(Mark("dashes", "third", vertical_path(float(to_x(threshold[0]))), label=threshold[1]))
    return Chart("Scores", summary, unit, share, to_x.ticks, to_y.ticks, marks)


def separability_chart(nearest_cosine: np.ndarray) -> Chart:
    """Histogram of the cosine of each class weight to its nearest other."""
    counts, edges = separability_histogram(nearest_cosine)
    mean, std = float(nearest_cosine.mean()), float(nearest_cosine.std())
    to_x, to_y = plot_scales((edges[0], edges[-1]), (0, 1.08 * counts.max()))
    marks = [
        Mark("area", "first", bars_path(to_x(edges), to_y(counts), float(to_y(0))), label="class weights"),
        Mark("dashes", "third", vertical_path(float(to_x(mean))), label=f"mean {mean:.3f}"),
    ]
    return Chart(
        "Separability of the class weights (Sep)",
        f"Histogram over {counted(len(nearest_cosine), 'class', 'classes')}: mean {mean:.3f}, standard deviation {std:.3f}.",
        "cosine to the nearest other class",
        "classes",
        to_x.ticks,
        [tick for tick in to_y.ticks if tick.text.replace(",", "").isdecimal()],
        marks,
    )


def rank_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Rank-1 rate over the number of distractors, from the rows of a report."""
    number, rate = (np.array([row[name] for row in rows], float) for name in ("distractors", "rate"))
    scales = to_x, to_y = plot_scales((number[0] / 1.3, number[-1] * 1.3), (0, 1), log_x=True)
    return Chart(
        "Identification",
        f"Rank-1 rate: {rate[0]:.2%} among {number[0]:,.0f} distractors, {rate[-1]:.2%} among {number[-1]:,.0f}.",
        "distractors in the gallery",
        "rank-1 rate",
        to_x.ticks,
        to_y.ticks,
        line_marks(number, rate, scales, "first", number=".2%"),
    )


def training_charts(rows: Sequence[Mapping[str, str]]) -> list[Chart]:
    """Charts of the columns of log.csv with two numbers or more, over the steps; also of each part of the loss."""
    parts = [name for name in (rows[0] if rows else ()) if name.startswith("loss/")]
    titles = {**LOGGED, **{name: ("Part of the loss", name.partition("/")[2]) for name in parts}}
    charts = []
    for name, (title, label) in titles.items():
        step, values = _column(rows, name)
        if len(step) < 2:
            continue
        low = values.min() if name.startswith("loss") else min(0, values.min())
        ticks = linear_ticks(low, values.max())
        scales = to_x, to_y = plot_scales((0, step[-1]), (ticks[0], ticks[-1]))
        marks = line_marks(step, values, scales, "first")
        summary = f"{title} from step {step[0]:,.0f} to {step[-1]:,.0f}: first {values[0]:.4g}, last {values[-1]:.4g}."
        charts.append(Chart(title, summary, "step", label, to_x.ticks, to_y.ticks, marks))
    return charts


def _column(rows: Sequence[Mapping[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column, without the rows that have none."""
    present = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    step, values = np.array(present).reshape(-1, 2).T
    return step, values


class Measurements(NamedTuple):
    """A measure of one loss: its mean, its standard deviation if it was measured with several seeds, and all values."""

    name: str
    mean: float
    std: float | None
    values: Sequence[float]


def rows_chart(title: str, label: str, rows: Sequence[Measurements], number: str) -> Chart:
    """A row for each loss: the mean with its standard deviation, and the values of the seeds."""
    height = ROWS_TOP + ROW_HEIGHT * len(rows) + BOTTOM
    bounds = [value for row in rows for value in (*row.values, row.mean - (row.std or 0), row.mean + (row.std or 0))]
    ticks = linear_ticks(min(bounds), max(bounds))
    scale = Scale(ticks[0], ticks[-1], 12.0, WIDTH - RIGHT - 12.0)
    labels, bars, means, seeds = [], [], [], []
    for position, row in enumerate(rows):
        y = ROWS_TOP + ROW_HEIGHT * (position + 0.72)
        labels.append(Tick(y - 11, row.name))
        x = float(scale(row.mean))
        spread = f" ± {row.std:{number}}" if row.std is not None else ""
        means.append(Dot(round(x, 1), y, f"{row.name}: {row.mean:{number}}{spread}"))
        if row.std is not None:
            low, high = (float(scale(row.mean + sign * row.std)) for sign in (-1, 1))
            bars.append(f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}V{y + 4}M{high:.1f} {y - 4}V{y + 4}")
            seeds += [Dot(round(float(scale(value)), 1), y, f"{row.name}: {value:{number}}") for value in row.values]
    marks = []
    if seeds:
        marks = [Mark("line", "first", "".join(bars)), Mark("points", "second", dots=seeds, label="a seed")]
    marks.append(Mark("dots", "first", dots=means, label="mean ± standard deviation" if seeds else "value"))
    summary = "; ".join(dot.text for dot in means)
    return Chart(title, summary, label, "", scale.ticks, (), marks, height, ROWS_TOP, labels)

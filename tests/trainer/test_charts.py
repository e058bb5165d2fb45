"""The geometry of the charts in pages: scales, ticks, thinned lines, histograms."""

import re

import numpy as np
import pytest

from fused_margin import evaluation
from fused_margin.trainer.evaluate.histograms import score_histogram
from fused_margin.trainer.pages.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    bars_path,
    line_marks,
    linear_ticks,
    plot_scales,
    tick_texts,
)
from fused_margin.trainer.pages.plots import Measurements, roc_chart, rows_chart, score_chart, training_charts


def points(path):
    return np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path), float)


def test_scales():
    to_x, to_y = plot_scales((1, 100), (0, 2), log_x=True)
    assert to_x([1, 10, 100]) == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    assert to_y([0, 1, 2]) == pytest.approx([HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP])  # upwards
    assert [tick.text for tick in to_x.ticks] == ["1", "10", "100"]
    assert [tick.text for tick in Scale(2e-4, 1, 0, 1, log=True).ticks] == ["10⁻³", "10⁻²", "10⁻¹", "1"]
    assert [tick.text for tick in Scale(1e-9, 1, 0, 1, log=True).ticks][-2:] == ["10⁻²", "1"]  # every second one
    same, _ = plot_scales((3, 3), (0, 1))  # one value
    assert same.low < 3 < same.high


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (3, 1234, ["0", "250", "500", "750", "1,000", "1,250"]),
        (-0.4, 0.2, ["-0.4", "-0.2", "0.0", "0.2"]),
        (0, 0.06, ["0.00", "0.02", "0.04", "0.06"]),
        (0, 2.4e-5, ["0", "0.5·10⁻⁵", "1·10⁻⁵", "1.5·10⁻⁵", "2·10⁻⁵", "2.5·10⁻⁵"]),
        (0, 4e6, ["0", "1·10⁶", "2·10⁶", "3·10⁶", "4·10⁶"]),
    ],
)
def test_ticks(low, high, texts):
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low < ticks[1] and ticks[-2] < high <= ticks[-1]
    assert tick_texts(ticks) == texts


def test_long_lines_are_averaged():
    step = np.arange(1, 10_001)
    value = np.sin(step / 500) + np.where(step == 5000, 3.0, 0.0)
    scales = plot_scales((0, 10_000), (-4, 4))
    band, line = line_marks(step, value, scales, "first", "label")
    assert (band.kind, line.kind, line.label) == ("band", "line", "label")
    assert len(points(line.path)) == MAX_POINTS and len(points(band.path)) == 2 * MAX_POINTS
    expected = [part.mean() for part in np.array_split(value, MAX_POINTS)]
    assert points(line.path)[:, 1] == pytest.approx(scales[1](expected), abs=0.06)
    assert points(band.path)[:, 1].min() == pytest.approx(scales[1](value.max()), abs=0.06)  # the outlier is visible
    line, few = line_marks(step[:5], value[:5], scales, "first")
    assert few.kind == "points" and few.dots[0].text == "1: 0.002" and len(points(line.path)) == 5


def test_roc_curve_is_drawn_at_its_values():
    rng = np.random.default_rng(0)
    scores, same = np.concatenate([rng.normal(1, 1, 400), rng.normal(0, 1, 4000)]), np.arange(4400) < 400
    summary = evaluation.summarize_pairs(scores, same, 1e-2)
    chart = roc_chart(summary)
    to_x, to_y = plot_scales((1 / 8000, 1), (0, 1), log_x=True)
    (line,) = [mark for mark in chart.marks if mark.label == "measured"]
    far = np.geomspace(1 / 8000, 1, 300)
    tar = [max(tar for rate, tar in zip(*summary.roc, strict=True) if rate <= limit) for limit in far]
    assert points(line.path)[::2] == pytest.approx(np.stack([to_x(far), to_y(tar)], axis=1), abs=0.06)
    (dot,) = [dot for mark in chart.marks for dot in mark.dots]
    assert (dot.x, dot.y) == pytest.approx((float(to_x(0.01)), float(to_y(summary.tar.tar))), abs=0.06)


def test_histograms():
    genuine, impostor = np.array([0.0, 1.0, 1.0]), np.array([-1.0, 0.0])
    tar = evaluation.tar_at_far(genuine, impostor, 0.5)
    summary = evaluation.summarize(genuine, impostor, tar, np.array([30.0, 10.0]))
    bins = score_histogram(summary)
    assert bins.edges[[0, -1]].tolist() == [-1, 1] and (bins.num_genuine, bins.num_impostor) == (3, 40)
    assert bins.genuine[30] == pytest.approx(1 / 3) and bins.genuine[-1] == pytest.approx(2 / 3)
    assert bins.impostor[0] == 0.75 and bins.impostor[30] == 0.25
    assert [mark.label for mark in score_chart(summary, "cosine").legend] == [
        "40 impostor pairs",
        "3 genuine pairs",
        "threshold at FAR 0.5",
    ]
    outline = bars_path(np.array([0.0, 10.0, 20.0]), np.array([5.0, 7.0]), 100.0)
    assert outline == "M0.0 100.0L0.0 5.0L10.0 5.0L10.0 7.0L20.0 7.0L20.0 100.0Z"


def test_training_curves():
    rows = [
        {
            "step": str(step),
            "loss": str(9 / step),
            "lr": "0.1",
            "loss/arcface": "5",
            "accuracy": "" if step < 3 else "1",
        }
        for step in (1, 2, 3)
    ]
    charts = training_charts(rows)
    assert [(chart.title, chart.y_label) for chart in charts] == [
        ("Loss", "loss"),
        ("Learning rate", "of the backbone"),
        ("Part of the loss", "arcface"),
    ]
    assert charts[0].summary == "Loss from step 1 to 3: first 9, last 3."
    assert training_charts(rows[:1]) == training_charts([]) == []


def test_error_bars():
    rows = [Measurements("a", 50.0, 10.0, [40.0, 60.0]), Measurements("b", 70.0, 5.0, [65.0, 75.0])]
    chart = rows_chart("Accuracy", "%", rows, ".1f")
    bars, seeds, means = chart.marks
    scale = Scale(40, 80, 12, WIDTH - RIGHT - 12)
    starts, ends = zip(*re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", bars.path), strict=True)
    assert np.array(starts, float) == pytest.approx(scale([40, 65]), abs=0.06)
    assert np.array(ends, float) == pytest.approx(scale([60, 75]), abs=0.06)
    assert [dot.x for dot in means.dots] == pytest.approx(scale([50, 70]), abs=0.06) and len(seeds.dots) == 4
    assert chart.summary == "a: 50.0 ± 10.0; b: 70.0 ± 5.0"
    (only,) = rows_chart("Time", "ms", [Measurements("a", 5.0, None, [5.0])], ".1f").marks
    assert only.label == "value" and only.dots[0].text == "a: 5.0"

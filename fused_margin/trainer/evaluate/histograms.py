"""The histograms that figures and pages of reports draw: scores of pairs, and separability of class weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fused_margin.evaluation import ScoreSummary

SCORE_BINS = 60


class ScoreHistogram(NamedTuple):
    """Shares of the genuine and of the impostor scores in each bin."""

    edges: np.ndarray  # (SCORE_BINS + 1,)
    genuine: np.ndarray  # (SCORE_BINS,)
    impostor: np.ndarray  # (SCORE_BINS,)
    num_genuine: int
    num_impostor: int


def score_histogram(summary: ScoreSummary) -> ScoreHistogram:
    """Histogram of the scores of the pairs of an evaluation."""
    return histogram(summary.genuine, summary.impostor, summary.impostor_count)


def histogram(genuine: np.ndarray, impostor: np.ndarray, count: np.ndarray | None = None) -> ScoreHistogram:
    """Histogram of scores, over the range of all of them.

    Args:
        genuine: (num_genuine,) of pairs of one identity, or of probes and their mates.
        impostor: (num_impostor,) of pairs of two identities, or of unknown probes.
        count: (num_impostor,) number of times that each impostor score occurs.
    """
    count = np.ones(len(impostor)) if count is None else count
    shown = impostor[count > 0]
    low, high = min(genuine.min(), shown.min()), max(genuine.max(), shown.max())
    edges = np.linspace(low, high if high > low else low + 1, SCORE_BINS + 1)
    of_genuine, of_impostor = (
        np.histogram(scores, edges, weights=weight)[0] / weight.sum()
        for scores, weight in ((genuine, np.ones(len(genuine))), (impostor, count))
    )
    return ScoreHistogram(edges, of_genuine, of_impostor, len(genuine), round(count.sum()))


def separability_histogram(nearest_cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of classes in each bin, and the edges of the bins, of the cosine to the nearest other class weight."""
    counts, edges = np.histogram(nearest_cosine, min(60, 5 + 2 * math.isqrt(len(nearest_cosine))))
    return counts, edges

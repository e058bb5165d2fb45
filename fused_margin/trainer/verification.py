"""Verification: which pairs are compared, and the protocols, as functions of the pairs' scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import auc, roc_curve

from .data.base import DataError


class Pairs(NamedTuple):
    """Image pairs in the order of the folds, as LFW lists them."""

    indices: np.ndarray  # (num_pairs, 2) rows of the test embeddings
    same: np.ndarray  # (num_pairs,) bool: both images show one identity
    fold: np.ndarray  # (num_pairs,) number of the fold
    folds_disjoint: bool  # no identity appears in two folds


class FoldAccuracy(NamedTuple):
    """Accuracy and chosen threshold of every fold."""

    accuracy: np.ndarray  # (folds,)
    threshold: np.ndarray  # (folds,)


class RocCurve(NamedTuple):
    """True accept rate over false accept rate, both ascending."""

    far: np.ndarray
    tar: np.ndarray


def make_pairs(labels: np.ndarray, num_pairs: int, folds: int, seed: int) -> Pairs:
    """Draw pairs as LFW does: half of each fold one identity, half two, no pair twice.

    The identities are divided among the folds where there are enough of them (two per fold, each
    with two images); otherwise all folds draw from all identities. Where the images do not give
    `num_pairs` unequal pairs, there are fewer, still half and half.
    """
    rng = np.random.default_rng(seed)
    present, counts = np.unique(labels, return_counts=True)
    rich = rng.permutation(present[counts >= 2])
    if len(present) < 2 or not len(rich):
        raise DataError(
            "verification needs two identities or more, one of them with two images; "
            f"the test set has {len(present)} identities, {len(rich)} with two images"
        )
    disjoint = len(rich) >= 2 * folds
    if disjoint:
        groups = np.array_split(rich, folds)
        pools = [_draw_pairs(labels, group, num_pairs // (2 * folds), rng) for group in groups]
    else:
        positive, negative = _draw_pairs(labels, present, num_pairs // 2, rng)
        pools = list(zip(np.array_split(positive, folds), np.array_split(negative, folds), strict=True))
    if sum(len(positive) for positive, _ in pools) < 2:
        raise DataError("verification needs two pairs of one identity or more; the test set has one")
    indices = [half for pool in pools for half in pool]
    same = [np.full(len(half), i == 0) for pool in pools for i, half in enumerate(pool)]
    fold = [np.full(len(half), f) for f, pool in enumerate(pools) for half in pool]
    return Pairs(np.concatenate(indices), np.concatenate(same), np.concatenate(fold), disjoint)


def kfold_accuracy(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> FoldAccuracy:
    """Accuracy on each fold at the threshold that is best on the other folds together.

    A pair is accepted when its score reaches the threshold. Thresholds are tried at every score
    of the other folds; among equally good ones the highest is taken.
    """
    accuracies, thresholds = [], []
    for held_out in np.unique(fold):
        rest, part = fold != held_out, fold == held_out
        far, tar, candidates = roc_curve(same[rest], scores[rest], drop_intermediate=False)
        candidates[0] = np.nextafter(candidates[1], np.inf)  # accepts none, as the infinity there
        num_same = np.count_nonzero(same[rest])
        num_different = np.count_nonzero(~same[rest])
        threshold = candidates[np.argmax(tar * num_same + (1 - far) * num_different)]
        accuracies.append(np.mean((scores[part] >= threshold) == same[part]))
        thresholds.append(threshold)
    return FoldAccuracy(np.array(accuracies), np.array(thresholds))


def roc(scores: np.ndarray, same: np.ndarray) -> RocCurve:
    """True accept rate over false accept rate of all pairs."""
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    return RocCurve(far, tar)


def area_under_curve(curve: RocCurve) -> float:
    return float(auc(curve.far, curve.tar))


def tar_at_far(curve: RocCurve, far: float) -> float:
    """Best true accept rate among the thresholds whose false accept rate is `far` or less."""
    return float(curve.tar[curve.far <= far].max())


def _draw_pairs(
    labels: np.ndarray, identities: np.ndarray, per_kind: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Equally many pairs of one identity and of two, at most `per_kind` of each."""
    images = [np.flatnonzero(labels == identity) for identity in identities]
    rich = [members for members in images if len(members) >= 2]

    def one_identity() -> np.ndarray:
        return rng.choice(rich[rng.integers(len(rich))], 2, replace=False)

    def two_identities() -> np.ndarray:
        first, second = rng.choice(len(images), 2, replace=False)
        return np.array([rng.choice(images[first]), rng.choice(images[second])])

    positive = _distinct(one_identity, per_kind)
    negative = _distinct(two_identities, per_kind)
    kept = min(len(positive), len(negative))
    return positive[:kept], negative[:kept]


def _distinct(draw, wanted: int) -> np.ndarray:
    """Up to `wanted` unequal pairs; gives up when draws hardly ever bring a new one."""
    pairs: dict[tuple[int, int], None] = {}  # keeps the order of drawing
    for _ in range(20 * wanted):
        if len(pairs) == wanted:
            break
        pairs[tuple(sorted(draw().tolist()))] = None
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)

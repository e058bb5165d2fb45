"""Verification pairs drawn from labeled images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .plurals import counted_identities


class Pairs(NamedTuple):
    """Image pairs, ordered by fold as in LFW's list: the result of :func:`make_pairs`.

    Attributes:
        indices: (num_pairs, 2) rows of the features.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) fold indices.
        folds_disjoint: whether no identity appears in two folds.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import make_pairs
        >>> make_pairs(np.arange(100) // 5, num_pairs=40, folds=10, seed=0).folds_disjoint
        True
    """

    indices: np.ndarray
    same: np.ndarray
    fold: np.ndarray
    folds_disjoint: bool


def make_pairs(labels: np.ndarray, num_pairs: int, folds: int, seed: int) -> Pairs:
    """Draw distinct pairs of images, as LFW does.

    Half of the pairs of each fold are genuine (one identity), and half are impostor pairs (two identities). If every
    fold can have two identities with two images each, no identity is in two folds. Otherwise all folds draw from all
    identities. The result is balanced, and smaller than ``num_pairs`` if there are not enough distinct pairs.

    Args:
        labels: (num_images,) identity of each image.
        num_pairs: number of pairs to draw, over all folds.
        folds: number of folds.
        seed: of the random draw.

    Raises:
        DataError: the images do not give two genuine and two impostor pairs.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import make_pairs
        >>> labels = np.arange(100) // 5  # 20 identities of 5 images
        >>> pairs = make_pairs(labels, num_pairs=40, folds=10, seed=0)
        >>> pairs.indices.shape, int(pairs.same.sum())
        ((40, 2), 20)
    """
    rng = np.random.default_rng(seed)
    present, counts = np.unique(labels, return_counts=True)
    repeated = rng.permutation(present[counts >= 2])
    if len(present) < 2 or not len(repeated):
        raise DataError(
            "verification needs two identities or more, one of them with two images; "
            f"there are images of {counted_identities(len(present))}, {len(repeated):,} of them with two or more"
        )
    disjoint = len(repeated) >= 2 * folds
    if disjoint:
        groups = np.array_split(repeated, folds)
        pools = [_draw_pairs(labels, group, num_pairs // (2 * folds), rng) for group in groups]
    else:
        positive, negative = _draw_pairs(labels, present, num_pairs // 2, rng)
        pools = list(zip(np.array_split(positive, folds), np.array_split(negative, folds), strict=True))
    if sum(len(positive) for positive, _ in pools) < 2:
        raise DataError("verification needs two genuine pairs or more; the images give one")
    indices = [half for pool in pools for half in pool]
    same = [np.full(len(half), i == 0) for pool in pools for i, half in enumerate(pool)]
    fold = [np.full(len(half), f) for f, pool in enumerate(pools) for half in pool]
    return Pairs(np.concatenate(indices), np.concatenate(same), np.concatenate(fold), disjoint)


def _draw_pairs(
    labels: np.ndarray, identities: np.ndarray, per_kind: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Equal numbers of genuine and impostor pairs, at most `per_kind` of each."""
    images = [np.flatnonzero(labels == identity) for identity in identities]
    repeated = [members for members in images if len(members) >= 2]

    def one_identity() -> np.ndarray:
        return rng.choice(repeated[rng.integers(len(repeated))], 2, replace=False)

    def two_identities() -> np.ndarray:
        first, second = rng.choice(len(images), 2, replace=False)
        return np.array([rng.choice(images[first]), rng.choice(images[second])])

    positive = _distinct(one_identity, per_kind)
    negative = _distinct(two_identities, per_kind)
    count = min(len(positive), len(negative))
    return positive[:count], negative[:count]


def _distinct(draw: Callable[[], np.ndarray], wanted: int) -> np.ndarray:
    """Up to `wanted` distinct pairs; fewer if 20 draws per pair do not find them."""
    pairs: dict[tuple[int, int], None] = {}  # a dictionary keeps the order
    for _ in range(20 * wanted):
        if len(pairs) == wanted:
            break
        pairs[tuple(sorted(draw().tolist()))] = None
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)

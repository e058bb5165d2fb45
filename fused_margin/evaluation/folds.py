"""Folds by the order of the pairs, as published lists define them."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold


def unshuffled_folds(num_pairs: int, folds: int = 10) -> np.ndarray:
    """Fold index (num_pairs,) of each pair. Folds are consecutive and differ in size by one at most.

    Raises:
        ValueError: there are fewer pairs than folds.
    """
    if num_pairs < folds:
        raise ValueError(f"pairs: expected at least {folds}, one per fold, got {num_pairs}")
    fold = np.empty(num_pairs, np.int64)
    for number, (_, part) in enumerate(KFold(folds).split(fold)):
        fold[part] = number
    return fold


def stratified_folds(same: np.ndarray, folds: int = 10) -> np.ndarray:
    """Fold index (num_pairs,) of each pair, stratified: `unshuffled_folds` of genuine and of impostor pairs.

    Args:
        same: (num_pairs,) bool, True for pairs of one identity.

    Raises:
        ValueError: there are fewer genuine or impostor pairs than folds.
    """
    fewest = int(min(np.count_nonzero(same), np.count_nonzero(~same)))
    if fewest < folds:
        raise ValueError(
            f"pairs: expected at least {folds} genuine and {folds} impostor pairs, one per fold, got {fewest}"
        )
    fold = np.empty(len(same), np.int64)
    for number, (_, part) in enumerate(StratifiedKFold(folds).split(same, same)):
        fold[part] = number
    return fold

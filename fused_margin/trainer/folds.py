"""Folds of pairs as published lists imply them: by their order."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold


def unshuffled_folds(num_pairs: int, folds: int = 10) -> np.ndarray:
    """Fold (num_pairs,) of each pair: consecutive pairs, sizes that differ by one at most.

    Raises:
        ValueError: there are fewer pairs than folds.
    """
    if num_pairs < folds:
        raise ValueError(f"pairs: expected at least one for each of the {folds} folds, got {num_pairs}")
    fold = np.empty(num_pairs, np.int64)
    for number, (_, part) in enumerate(KFold(folds).split(fold)):
        fold[part] = number
    return fold


def folds_of_each_kind(same: np.ndarray, folds: int = 10) -> np.ndarray:
    """Fold (num_pairs,) of each pair, for a list that is not made of folds: as `unshuffled_folds`, of each kind apart.

    Args:
        same: (num_pairs,) bool, the two images show one identity.

    Raises:
        ValueError: there are fewer pairs of a kind than folds.
    """
    fewest = int(min(np.count_nonzero(same), np.count_nonzero(~same)))
    if fewest < folds:
        raise ValueError(f"pairs: expected at least {folds} of either kind, one for each fold, got {fewest}")
    fold = np.empty(len(same), np.int64)
    for number, (_, part) in enumerate(StratifiedKFold(folds).split(same, same)):
        fold[part] = number
    return fold

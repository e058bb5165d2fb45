"""Folds by the order of the pairs, as published lists define them."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold


def unshuffled_folds(num_pairs: int, folds: int = 10) -> np.ndarray:
    """The fold of each pair, by the order of the pairs: consecutive folds, whose sizes differ by at most one.

    Args:
        num_pairs: number of pairs.
        folds: number of folds.

    Returns:
        (num_pairs,) int64 fold indices.

    Raises:
        ValueError: there are fewer pairs than folds.

    Examples:
        >>> from fused_margin.evaluation import unshuffled_folds
        >>> unshuffled_folds(5, folds=2).tolist()
        [0, 0, 0, 1, 1]
    """
    if num_pairs < folds:
        raise ValueError(f"pairs: expected at least {folds}, one per fold, got {num_pairs}")
    fold = np.empty(num_pairs, np.int64)
    for number, (_, part) in enumerate(KFold(folds).split(fold)):
        fold[part] = number
    return fold


def stratified_folds(same: np.ndarray, folds: int = 10) -> np.ndarray:
    """The fold of each pair, stratified: :func:`unshuffled_folds` of genuine and of impostor pairs.

    Args:
        same: (num_pairs,) bool, True for pairs of one identity.
        folds: number of folds.

    Returns:
        (num_pairs,) int64 fold indices.

    Raises:
        ValueError: there are fewer genuine or impostor pairs than folds.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import stratified_folds
        >>> stratified_folds(np.array([True, True, False, False]), folds=2).tolist()
        [0, 1, 0, 1]
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

"""Folds of pairs as published lists imply them: by their order."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import KFold


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

"""Argument checks of the protocols. A ValueError names the array, the expected and the actual shape and type."""

from __future__ import annotations

import numpy as np

from .plurals import counted


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_features(name: str, features: np.ndarray, width: int | None = None, check_values: bool = True) -> None:
    fits = features.ndim == 2 and features.size and width in (None, features.shape[1])
    if not fits or not np.issubdtype(features.dtype, np.floating):
        wanted = f"(rows, {width or 'D'}) floats, one row or more"
        raise ValueError(f"{name}: expected {wanted}, got {features.shape} {features.dtype}")
    if check_values and not (finite := np.isfinite(features).all(axis=1)).all():
        raise ValueError(
            f"{name}: expected finite values, got NaN or infinity in {counted(int(np.count_nonzero(~finite)), 'row')}"
        )


def check_integers(name: str, values: np.ndarray, shape: tuple[int | None, ...]) -> None:
    fits = values.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, values.shape, strict=True))
    if not fits or not values.size or not np.issubdtype(values.dtype, np.integer):
        wanted = ", ".join("rows" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected ({wanted}) integers, one row or more, got {values.shape} {values.dtype}")


def check_scores(name: str, scores: np.ndarray) -> None:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: expected scores (n,), one or more, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected finite scores, got {np.count_nonzero(~np.isfinite(scores))} that are not")


def check_pair_arrays(same: np.ndarray, fold: np.ndarray, num_pairs: int) -> None:
    if same.dtype != np.bool_ or same.shape != (num_pairs,):
        raise ValueError(f"same: expected ({num_pairs},) bool, one per pair, got {same.shape} {same.dtype}")
    if not np.issubdtype(fold.dtype, np.integer) or fold.shape != (num_pairs,):
        raise ValueError(f"fold: expected ({num_pairs},) integers, one per pair, got {fold.shape} {fold.dtype}")


def check_folds(same: np.ndarray, fold: np.ndarray, num_pairs: int) -> None:
    """Raise ValueError unless a threshold can be chosen on the pairs outside each fold."""
    check_pair_arrays(same, fold, num_pairs)
    numbers = np.unique(fold)
    if len(numbers) < 2:
        raise ValueError(f"fold: expected two folds or more, got {len(numbers)}")
    for number in numbers:
        if len(np.unique(same[fold != number])) < 2:
            raise ValueError(f"same: expected genuine and impostor pairs outside fold {number}, got one kind")

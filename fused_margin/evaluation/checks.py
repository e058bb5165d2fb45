"""Argument checks of the protocols. An error names the array, the expected and the actual shape and type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real

import numpy as np

from .cosines import BLOCK_ELEMENTS
from .plurals import counted


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_array(name: str, value: np.ndarray) -> None:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(value).__name__}")


def check_features(name: str, features: np.ndarray, width: int | None = None, check_values: bool = True) -> None:
    check_array(name, features)
    fits = features.ndim == 2 and features.size and width in (None, features.shape[1])
    if not fits or not np.issubdtype(features.dtype, np.floating):
        wanted = f"(rows, {width or 'D'}) floats, one row or more"
        raise ValueError(f"{name}: expected {wanted}, got {features.shape} {features.dtype}")
    if not check_values:
        return
    if bad := sum(int(np.count_nonzero(~np.isfinite(block).all(axis=1))) for block in _blocks(features)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in {counted(bad, 'row')}")


def check_unit_rows(name: str, rows: np.ndarray) -> None:
    """Raise ValueError unless each row has length 1, within rounding, or is zero."""
    norm = np.concatenate([np.linalg.norm(np.asarray(block, np.float64), axis=1) for block in _blocks(rows)])
    if not (fits := (np.abs(norm - 1) < 1e-3) | (norm == 0)).all():
        row = int(np.argmin(fits))
        raise ValueError(f"{name}: expected rows of length 1, got length {norm[row]:.4g} in row {row}")


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks of the rows, so that checks of a memory map need little memory."""
    size = max(1, BLOCK_ELEMENTS // rows.shape[1])
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def check_labels(name: str, labels: np.ndarray | Sequence[str] | Sequence[int], rows: int | None = None) -> np.ndarray:
    """The labels as an array of texts or of int64; raise ValueError if they are neither or have a wrong shape."""
    array = np.asarray(labels)
    if array.dtype == object:  # as pandas stores texts, or integers beyond int64
        kinds = {type(label) for label in array.flat}
        array = array.astype(str) if kinds == {str} else np.array(array.tolist()) if kinds == {int} else array
    fits = array.ndim == 1 and array.size and rows in (None, len(array))
    is_integer = array.dtype.kind in "iu" and (array.size == 0 or array.max() <= np.iinfo(np.int64).max)
    if not fits or not (array.dtype.kind == "U" or is_integer):
        wanted = f"({'n' if rows is None else rows},) texts or integers, one or more"
        raise ValueError(f"{name}: expected {wanted}, got {array.shape} {array.dtype}")
    return array if array.dtype.kind == "U" else array.astype(np.int64)


def check_integers(name: str, values: np.ndarray, shape: tuple[int | None, ...]) -> None:
    check_array(name, values)
    fits = values.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, values.shape, strict=True))
    if not fits or not values.size or not np.issubdtype(values.dtype, np.integer):
        wanted = ", ".join("rows" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected ({wanted}) integers, one row or more, got {values.shape} {values.dtype}")


def check_scores(name: str, scores: np.ndarray) -> None:
    check_array(name, scores)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name}: expected scores (n,), one or more, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: expected finite scores, got {np.count_nonzero(~np.isfinite(scores))} that are not")


def check_pair_arrays(same: np.ndarray, fold: np.ndarray, num_pairs: int) -> None:
    check_array("same", same)
    check_array("fold", fold)
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


def check_count(name: str, value: int, largest: int | None = None, meaning: str = "") -> None:
    """Raise ValueError unless the value is an integer from 1 to `largest`, which the message explains."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < 1 or (largest is not None and value > largest):
        wanted = "a positive integer" if largest is None else f"an integer from 1 to {largest}, {meaning}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def check_threshold(threshold: object) -> None:
    if not isinstance(threshold, Real):
        raise TypeError(f"threshold: expected a number, got {threshold!r}")
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got NaN")


def check_workspace(workspace_mb: float) -> None:
    if not 0 < workspace_mb < np.inf:
        raise ValueError(f"workspace_mb: expected a positive number of MiB, got {workspace_mb}")

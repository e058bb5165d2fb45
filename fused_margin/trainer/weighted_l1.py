"""A verification head that is learned: weighted L1 distance of two features, the weights by logistic regression."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

BLOCK_VALUES = 2**23  # differences held at once, 64 MiB in float64
REGULARISATION = tuple(10.0**n for n in range(-4, 2))  # scikit-learn's C: the inverse of the L2 penalty's strength
INNER_FOLDS = 3  # of the cross-validation that chooses it


class WeightedL1Head(NamedTuple):
    """score = bias - sum_i alpha_i |f1_i - f2_i|: the log odds that two features are of one identity."""

    alpha: np.ndarray  # (D,) of any sign
    bias: float
    regularisation: float  # the C that was chosen
    num_pairs: int  # that it was fitted on

    def scores(self, features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Scores (num_pairs,) of pairs (num_pairs, 2) of rows of features (num_rows, D), higher is more alike."""
        blocks = np.array_split(pairs, max(1, -(-pairs.size * len(self.alpha) // (2 * BLOCK_VALUES))))
        return np.concatenate([self.bias - _differences(features, block) @ self.alpha for block in blocks])


def fit_head(
    features: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray,
    *,
    max_pairs: int | None = None,
    seed: int = 0,
) -> WeightedL1Head:
    """Fit DeepFace's weighted distance d(f1, f2) = sum_i alpha_i |f1_i - f2_i| (Taigman et al., CVPR 2014, sec. 4.2).

    As there, the differences feed one logistic unit, trained with cross-entropy, so alpha may be of
    either sign: a dimension in which two images of one identity differ more than those of two tells
    something too. An L2 penalty bounds alpha, which a few thousand pairs do not; its strength is
    chosen by cross-validation within these pairs, by whole folds where each has pairs of both kinds,
    so that identities stay apart. The differences are standardised for the fit, or the penalty would
    weigh on the dimensions unequally; the alpha that is returned is for differences as they are.

    Args:
        features: (num_rows, D) float64; normalise them before, or their length counts.
        pairs: (num_pairs, 2) rows.
        same: (num_pairs,) bool, the two rows show one identity.
        fold: (num_pairs,) integers.
        max_pairs: where there are more pairs, so many drawn at random are fitted; if not given, as many as
            have `BLOCK_VALUES` differences, and 1,000 at least. The fit holds several copies of these.
        seed: of the draw.

    Raises:
        ValueError: there are fewer than three pairs of a kind.
    """
    if max_pairs is None:
        max_pairs = max(1000, BLOCK_VALUES // features.shape[1])
    if len(pairs) > max_pairs:
        drawn = np.sort(np.random.default_rng(seed).choice(len(pairs), max_pairs, replace=False))
        pairs, same, fold = pairs[drawn], same[drawn], fold[drawn]
    rarer = min(np.count_nonzero(same), np.count_nonzero(~same))
    if rarer < INNER_FOLDS:
        raise ValueError(f"same: expected {INNER_FOLDS} pairs of each kind or more to fit a head on, got {rarer}")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": REGULARISATION},
        scoring="neg_log_loss",
        cv=_inner_splits(same, fold),
    )
    search.fit(_differences(features, pairs), same)
    scaler, unit = search.best_estimator_
    weight = unit.coef_[0] / scaler.scale_
    bias = float(unit.intercept_[0] - weight @ scaler.mean_)
    return WeightedL1Head(-weight, bias, search.best_params_["logisticregression__C"], len(pairs))


def _inner_splits(same: np.ndarray, fold: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    numbers = np.unique(fold)
    if len(numbers) >= INNER_FOLDS and all(len(np.unique(same[fold == number])) == 2 for number in numbers):
        return list(GroupKFold(INNER_FOLDS).split(same, same, fold))
    return list(StratifiedKFold(INNER_FOLDS).split(same, same))


def _differences(features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.abs(features[pairs[:, 0]] - features[pairs[:, 1]])

"""DeepFace's weighted L1 distance of two features, whose weights a logistic regression learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .checks import check_features, check_integers, check_pair_arrays

if TYPE_CHECKING:
    from fused_margin.losses import SiameseL1Loss

BLOCK_VALUES = 2**23  # differences in memory at a time, 64 MiB in float64
REGULARISATION = tuple(10.0**n for n in range(-4, 2))  # scikit-learn's C: the inverse of the L2 penalty's strength
INNER_FOLDS = 3  # of the cross-validation that chooses C


class WeightedL1Head(NamedTuple):
    """DeepFace's weighted L1 distance of two features: the result of :func:`fit_head`, or of a training.

    ``score = bias - sum_i alpha_i |f1_i - f2_i|`` is the log odds that two features belong to one identity.

    Attributes:
        alpha: (D,), of either sign.
        bias: the log odds at distance 0.
        regularisation: the chosen C of scikit-learn's logistic regression; None if a loss has learned the distance.
        num_pairs: number of training pairs; None if a loss has learned the distance.
        normalize: whether the distance is of features of unit length.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import WeightedL1Head
        >>> head = WeightedL1Head(alpha=np.array([1.0, 2.0]), bias=3.0, regularisation=1.0, num_pairs=100)
        >>> head.scores(np.array([[0.0, 0.0], [1.0, 0.5]]), np.array([[0, 0], [0, 1]])).tolist()
        [3.0, 1.0]
    """

    alpha: np.ndarray
    bias: float
    regularisation: float | None = None
    num_pairs: int | None = None
    normalize: bool = True

    @classmethod
    def of_loss(cls, loss: SiameseL1Loss) -> WeightedL1Head:
        """The distance that a :class:`fused_margin.SiameseL1Loss` has learned.

        Its scores are the log odds of the loss, if the features are normalized as in the loss: to unit length, unless its
        ``normalize`` is False. :func:`weighted_l1_pairs` normalizes them, and verifies with the scores.

        Examples:
            >>> import numpy as np, fused_margin
            >>> from fused_margin.evaluation import WeightedL1Head
            >>> head = WeightedL1Head.of_loss(fused_margin.SiameseL1Loss(embedding_size=4))  # alpha 2 and bias 2
            >>> head.scores(np.eye(4), np.array([[0, 0], [0, 1]])).tolist()
            [2.0, -2.0]
        """
        return cls(loss.alpha.detach().double().cpu().numpy(), loss.bias.item(), normalize=loss.normalize)

    def scores(self, features: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Scores (num_pairs,) of pairs (num_pairs, 2) of rows of features (num_rows, D); higher means more similar."""
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
    """Fit DeepFace's weighted L1 distance of two features.

    ``d(f1, f2) = sum_i alpha_i |f1_i - f2_i|`` (Taigman et al., CVPR 2014, sec. 4.2). As in the paper, one logistic
    unit takes the differences and is trained with cross-entropy, so alpha may have either sign. An L2 penalty bounds
    alpha, because a few thousand pairs do not determine it. Cross-validation within the given pairs chooses the
    strength of the penalty. It does not divide folds if each has both kinds of pairs, so that identities are not shared
    between training and validation pairs. The differences are standardized for the fit, so that the penalty treats all
    dimensions alike; the returned alpha applies to the original differences.

    Args:
        features: (num_rows, D) float64, usually of unit norm.
        pairs: (num_pairs, 2) rows of ``features``.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) integers.
        max_pairs: largest number of pairs to fit; a larger set is subsampled at random. The default is the number of
            pairs that have 2^23 differences, at least 1,000. The fit needs several copies of the differences.
        seed: of the random subset.

    Raises:
        ValueError: an array has a wrong shape or dtype, or there are fewer than three genuine or three impostor pairs.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import fit_head
        >>> features = np.random.default_rng(0).normal(size=(40, 2))
        >>> features[1::2, 0] = features[::2, 0]  # rows 2i and 2i + 1, of one identity, agree here
        >>> even = np.arange(0, 40, 2)
        >>> pairs = np.concatenate([np.stack([even, even + 1], 1), np.stack([even, (even + 3) % 40], 1)])
        >>> same, fold = np.arange(40) < 20, np.arange(40) % 2
        >>> head = fit_head(features, pairs, same, fold)
        >>> bool(head.alpha[0] > abs(head.alpha[1]))
        True
    """
    check_features("features", features)
    check_integers("pairs", pairs, (None, 2))
    check_pair_arrays(same, fold, len(pairs))
    if max_pairs is None:
        max_pairs = max(1000, BLOCK_VALUES // features.shape[1])
    if len(pairs) > max_pairs:
        drawn = np.sort(np.random.default_rng(seed).choice(len(pairs), max_pairs, replace=False))
        pairs, same, fold = pairs[drawn], same[drawn], fold[drawn]
    rarer = min(np.count_nonzero(same), np.count_nonzero(~same))
    if rarer < INNER_FOLDS:
        raise ValueError(
            f"same: expected at least {INNER_FOLDS} genuine and {INNER_FOLDS} impostor pairs to fit a head, got {rarer}"
        )
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

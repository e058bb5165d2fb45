"""Metrics of verification scores: accuracy over folds, ROC, error rates, TAR at FAR."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.metrics import auc, roc_curve

from .checks import check_folds, check_scores


class FoldAccuracy(NamedTuple):
    """Accuracy and threshold of each fold: the result of :func:`kfold_accuracy`.

    Attributes:
        accuracy: (folds,) share of pairs that are classified correctly.
        threshold: (folds,) scores.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import FoldAccuracy
        >>> result = FoldAccuracy(accuracy=np.array([0.75, 1.0]), threshold=np.array([0.4, 0.5]))
        >>> float(result.accuracy.mean())
        0.875
    """

    accuracy: np.ndarray
    threshold: np.ndarray


class RocCurve(NamedTuple):
    """False and true accept rates, both ascending: the result of :func:`roc`.

    Attributes:
        far: (num_points,) false accept rates.
        tar: (num_points,) true accept rates.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import roc
        >>> curve = roc(genuine=np.array([0.9, 0.6]), impostor=np.array([0.7, 0.1]))
        >>> list(zip(curve.far.tolist(), curve.tar.tolist()))
        [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    """

    far: np.ndarray
    tar: np.ndarray


class TarAtFar(NamedTuple):
    """True accept rate at a false accept rate: the result of :func:`tar_at_far`.

    Attributes:
        far: the requested false accept rate.
        tar: the true accept rate.
        threshold: pairs with a higher score are accepted; -inf accepts all.
        smallest_far: the rate of one false accept. A lower ``far`` allows none.

    Examples:
        >>> from fused_margin.evaluation import TarAtFar
        >>> TarAtFar(far=1e-3, tar=0.9, threshold=0.4, smallest_far=1e-2).resolved  # there are 100 impostors
        False
    """

    far: float
    tar: float
    threshold: float
    smallest_far: float

    @property
    def resolved(self) -> bool:
        """Whether there are enough impostors to distinguish ``far`` from 0."""
        return self.far >= self.smallest_far


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of genuine pairs (one identity) and impostor pairs (two identities), and their metrics.

    Attributes:
        genuine: (num_genuine,) scores; higher means more similar.
        impostor: (num_scores,) scores.
        impostor_count: (num_scores,) number of pairs with each score. None: one each.
        roc: the ROC curve.
        auc: the area under it.
        equal_error_rate: the rate at which false accepts equal false rejects.
        tar: the true accept rate at a false accept rate.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import summarize_pairs
        >>> scores, same = np.array([0.9, 0.6, 0.7, 0.1]), np.array([True, True, False, False])
        >>> summary = summarize_pairs(scores, same, far=0.1)
        >>> summary.auc, summary.equal_error_rate, summary.tar.tar
        (0.75, 0.5, 0.5)
    """

    genuine: np.ndarray
    impostor: np.ndarray
    impostor_count: np.ndarray | None
    roc: RocCurve
    auc: float
    equal_error_rate: float
    tar: TarAtFar


def kfold_accuracy(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> FoldAccuracy:
    """Accuracy on each fold at the best threshold of the other folds.

    A pair is accepted if its score is at least the threshold. Candidate thresholds lie between all scores of the other
    folds; the highest of equally good candidates is used.

    Args:
        scores: (num_pairs,); higher means more similar.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) integers.

    Returns:
        Accuracy and threshold of each fold, in ascending order of the folds.

    Raises:
        ValueError: a score is not finite, shapes differ, or a threshold cannot be chosen outside a fold.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import kfold_accuracy
        >>> scores = np.array([0.9, 0.2, 0.8, 0.3])
        >>> same, fold = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
        >>> kfold_accuracy(scores, same, fold).accuracy.tolist()
        [1.0, 1.0]
    """
    check_scores("scores", scores)
    check_folds(same, fold, len(scores))
    accuracies, thresholds = [], []
    for held_out in np.unique(fold):
        rest, part = fold != held_out, fold == held_out
        threshold = best_threshold(scores[rest], same[rest])
        accuracies.append(np.mean((scores[part] >= threshold) == same[part]))
        thresholds.append(threshold)
    return FoldAccuracy(np.array(accuracies), np.array(thresholds))


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The candidate threshold of :func:`kfold_accuracy` with the highest accuracy; there are pairs of both kinds."""
    far, tar, candidates = roc_curve(same, scores, drop_intermediate=False)
    candidates[0] = np.nextafter(candidates[1], np.inf)  # finite, and accepts none
    best = int(np.argmax(tar * np.count_nonzero(same) + (1 - far) * np.count_nonzero(~same)))
    threshold = candidates[best]
    if 0 < best < len(candidates) - 1:
        # Halfway to the next lower score, so that held-out pairs with slightly lower scores are accepted.
        between = (threshold + candidates[best + 1]) / 2
        threshold = between if between > candidates[best + 1] else threshold
    return float(threshold)


def summarize(
    genuine: np.ndarray, impostor: np.ndarray, tar: TarAtFar, impostor_count: np.ndarray | None = None
) -> ScoreSummary:
    """ROC, AUC and equal error rate of the scores.

    Args:
        genuine, impostor, impostor_count: as for :func:`roc`.
        tar: the result of :func:`tar_at_far`, which is included as it is.

    Raises:
        ValueError: as :func:`roc`.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import summarize, tar_at_far
        >>> genuine, impostor = np.array([0.9, 0.6]), np.array([0.7, 0.1])
        >>> summarize(genuine, impostor, tar_at_far(genuine, impostor, far=0.1)).auc
        0.75
    """
    curve = roc(genuine, impostor, impostor_count)
    return ScoreSummary(
        genuine, impostor, impostor_count, curve, float(auc(curve.far, curve.tar)), equal_error_rate(curve), tar
    )


def summarize_pairs(scores: np.ndarray, same: np.ndarray, far: float) -> ScoreSummary:
    """All metrics of the scores of genuine and impostor pairs.

    Args:
        scores: (num_pairs,); higher means more similar.
        same: (num_pairs,) bool, True for pairs of one identity.
        far: the false accept rate of the true accept rate.

    Raises:
        ValueError: as :func:`roc` and :func:`tar_at_far`; also if ``same`` has a wrong shape or dtype.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import summarize_pairs
        >>> scores, same = np.array([0.9, 0.6, 0.7, 0.1]), np.array([True, True, False, False])
        >>> summarize_pairs(scores, same, far=0.5).tar.tar
        1.0
    """
    check_scores("scores", scores)
    if same.dtype != np.bool_ or same.shape != scores.shape:
        raise ValueError(f"same: expected {scores.shape} bool, one per score, got {same.shape} {same.dtype}")
    genuine, impostor = scores[same], scores[~same]
    return summarize(genuine, impostor, tar_at_far(genuine, impostor, far))


def roc(genuine: np.ndarray, impostor: np.ndarray, impostor_count: np.ndarray | None = None) -> RocCurve:
    """The ROC curve: true accept rate over false accept rate.

    It has one point per distinct score. Ties are accepted together.

    Args:
        genuine: (num_genuine,) scores of pairs of one identity; higher means more similar.
        impostor: (num_scores,) scores of pairs of two identities.
        impostor_count: (num_scores,) number of pairs with each score; one by default.

    Returns:
        The curve, from (0, 0) to (1, 1).

    Raises:
        ValueError: there are no scores of one kind, or one is not finite.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import roc
        >>> curve = roc(genuine=np.array([0.9, 0.6]), impostor=np.array([0.7, 0.1]))
        >>> curve.tar.tolist()
        [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    check_scores("genuine", genuine)
    check_scores("impostor", impostor)
    same = np.repeat([True, False], [len(genuine), len(impostor)])
    weight = None if impostor_count is None else np.concatenate([np.ones(len(genuine)), impostor_count])
    far, tar, _ = roc_curve(same, np.concatenate([genuine, impostor]), sample_weight=weight, drop_intermediate=False)
    return RocCurve(far, tar)


def equal_error_rate(curve: RocCurve) -> float:
    """The rate at which false accepts equal false rejects, by linear interpolation of the curve.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import equal_error_rate, roc
        >>> equal_error_rate(roc(genuine=np.array([0.9, 0.6]), impostor=np.array([0.7, 0.1])))
        0.5
    """
    return float(np.interp(0.0, curve.far - (1 - curve.tar), curve.far))


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float, num_impostors: int | None = None) -> TarAtFar:
    """Highest true accept rate at a false accept rate of at most ``far``.

    With n impostors, false accept rates are multiples of 1/n. A ``far`` below 1/n allows no false accept, and
    ``resolved`` is False. Impostors that tie with the highest rejected one are rejected too.

    Args:
        genuine: (num_genuine,) scores of pairs of one identity; higher means more similar.
        impostor: scores of pairs of two identities: all of them, or at least the highest ones, which determine the
            threshold.
        far: largest share of accepted impostors, 0 to 1.
        num_impostors: number of all impostors, if ``impostor`` has only the highest.

    Raises:
        ValueError: there are no scores of one kind, one is not finite, ``far`` is not a rate, or ``num_impostors`` is
            smaller than the number of given scores.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import tar_at_far
        >>> tar_at_far(genuine=np.array([0.9, 0.6]), impostor=np.array([0.7, 0.1]), far=0.1)
        TarAtFar(far=0.1, tar=0.5, threshold=0.7, smallest_far=0.5)
    """
    check_scores("genuine", genuine)
    check_scores("impostor", impostor)
    total = len(impostor) if num_impostors is None else num_impostors
    if total < len(impostor):
        raise ValueError(f"num_impostors: expected at least the {len(impostor)} given scores, got {total}")
    passing = false_accepts(far, total)
    if passing >= total:
        threshold = -math.inf
    elif passing >= len(impostor):
        raise ValueError(f"impostor: expected at least the {passing + 1} highest scores, got {len(impostor)}")
    else:
        index = len(impostor) - 1 - passing
        threshold = float(np.partition(impostor, index)[index])
    return TarAtFar(far, float(np.mean(genuine > threshold)), threshold, 1 / total)


def false_accepts(far: float, num_impostors: int) -> int:
    """Largest number of accepted impostors at a false accept rate of at most `far`."""
    if not 0 <= far <= 1:
        raise ValueError(f"far: expected a rate from 0 to 1, got {far}")
    passing = math.floor(far * num_impostors)
    return passing + ((passing + 1) / num_impostors <= far)  # 0.29 * 100 is 28.999...

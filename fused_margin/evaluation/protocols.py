"""Pair protocols: LFW, YouTube Faces, and accuracy over folds by cosine or weighted L1."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from sklearn.preprocessing import normalize

from .checks import check_choice, check_features, check_folds, check_integers
from .folds import unshuffled_folds
from .metrics import FoldAccuracy, best_threshold, kfold_accuracy
from .weighted_l1 import WeightedL1Head, fit_head

Flip = Literal["none", "sum", "concat"]
Metric = Literal["cosine", "weighted-l1"]
LfwVariant = Literal["insightface", "regularface"]
LFW_FLIP: dict[LfwVariant, Flip] = {"insightface": "sum", "regularface": "concat"}
INSIGHTFACE_FAR = 1e-3


class FoldTar(NamedTuple):
    """True accept rate on each fold, at a threshold chosen on the other folds for a false accept rate of 1e-3.

    Attributes:
        tar: (folds,) true accept rates.
        far: (folds,) false accept rates, measured on the fold.
        threshold: (folds,) squared distances.
        resolved: whether the other folds have enough impostors to distinguish the rate from 0.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import FoldTar
        >>> tar, far, threshold = np.array([0.9, 1.0]), np.array([0.0, 0.002]), np.array([1.2, 1.3])
        >>> result = FoldTar(tar, far, threshold, resolved=True)
        >>> float(result.tar.mean())
        0.95
    """

    tar: np.ndarray
    far: np.ndarray
    threshold: np.ndarray
    resolved: bool


class PairResult(NamedTuple):
    """Result of a pair protocol.

    Attributes:
        scores: (num_pairs,) cosines, or log odds of the weighted L1 distance.
        folds: accuracy and threshold of each fold.
        tar: true accept rates, of the variant ``"insightface"`` of :func:`lfw`.
        heads: the weighted L1 distance that is fitted for each fold, if one is.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import FoldAccuracy, PairResult
        >>> folds = FoldAccuracy(accuracy=np.array([0.9, 1.0]), threshold=np.array([0.4, 0.5]))
        >>> result = PairResult(np.array([0.9, 0.1]), folds)
        >>> mean, std = result.folds.accuracy.mean(), result.folds.accuracy.std()
        >>> print(f"{100 * mean:.1f} +- {100 * std:.1f} %")
        95.0 +- 5.0 %
    """

    scores: np.ndarray
    folds: FoldAccuracy
    tar: FoldTar | None = None
    heads: tuple[WeightedL1Head, ...] = ()


def join_mirror(features: np.ndarray, mirrored: np.ndarray | None, flip: Flip) -> np.ndarray:
    """Combine the features of images and their mirror images.

    Args:
        features: (n, D) of the images.
        mirrored: (n, D) of the mirror images.
        flip: ``"sum"`` or ``"concat"``; ``"none"`` returns ``features``.

    Returns:
        (n, D), or (n, 2 D) for ``"concat"``.

    Raises:
        ValueError: ``flip`` is unknown, or ``mirrored`` is missing or has another shape.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import join_mirror
        >>> join_mirror(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), "concat").tolist()
        [[1.0, 2.0, 3.0, 4.0]]
    """
    check_choice("flip", flip, get_args(Flip))
    if flip == "none":
        return features
    if mirrored is None:
        raise ValueError(f"mirrored: expected features of the mirror images to {flip}, got none")
    check_features("features", features)
    check_features("mirrored", mirrored)
    if mirrored.shape != features.shape:
        raise ValueError(f"mirrored: expected the features' shape {features.shape}, got {mirrored.shape}")
    return features + mirrored if flip == "sum" else np.concatenate([features, mirrored], axis=1)


def cosine_pairs(
    features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray | None = None
) -> PairResult:
    """Accuracy over folds by the cosine of each pair, as :func:`kfold_accuracy`.

    Args:
        features: (num_images, D), of any norm. A zero row has cosine 0 to all others.
        pairs: (num_pairs, 2) rows of ``features``.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) integers; by default ten folds of consecutive pairs.

    Raises:
        ValueError: an array is empty, has a wrong shape or type, is not finite or out of range, or there are fewer
            pairs than folds.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import cosine_pairs
        >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> pairs = np.array([[0, 1], [0, 2], [2, 3], [1, 3]])
        >>> same, fold = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
        >>> result = cosine_pairs(features, pairs, same, fold)
        >>> result.scores.round(2).tolist(), result.folds.accuracy.tolist()
        ([0.99, 0.0, 0.99, 0.22], [1.0, 1.0])
    """
    fold = _check_pairs(features, pairs, same, fold)
    unit = normalize(np.asarray(features, np.float64))
    scores = np.einsum("ij,ij->i", unit[pairs[:, 0]], unit[pairs[:, 1]])
    return PairResult(scores, kfold_accuracy(scores, same, fold))


def weighted_l1_pairs(
    features: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray | None = None,
    head: WeightedL1Head | None = None,
) -> PairResult:
    """Accuracy over folds by DeepFace's weighted L1 distance, learned on the other folds or in the training.

    Without ``head``, :func:`fit_head` fits one for each fold, on the normalized features of the other folds' pairs. The
    head scores the fold, and the best threshold on its scores of the other folds is used. The labels of a fold influence
    neither its scores nor its threshold.

    Args:
        features, pairs, same, fold: as for :func:`cosine_pairs`.
        head: a learned distance that scores all pairs, as of :meth:`WeightedL1Head.of_loss`. The folds then choose the
            thresholds only, as in :func:`kfold_accuracy`.

    Returns:
        Scores are log odds.

    Raises:
        ValueError: as :func:`cosine_pairs`; also if fewer than three genuine or impostor pairs are outside a fold, or if
            ``head`` is of features of another length.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import WeightedL1Head, weighted_l1_pairs
        >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> pairs = np.array([[0, 1], [0, 2], [2, 3], [1, 3]] * 4)
        >>> same, fold = np.array([True, False] * 8), np.arange(16) // 8
        >>> weighted_l1_pairs(features, pairs, same, fold).folds.accuracy.tolist()
        [1.0, 1.0]
        >>> head = WeightedL1Head(alpha=np.array([4.0, 4.0]), bias=2.0)
        >>> weighted_l1_pairs(features, pairs, same, fold, head).scores[:3].round(2).tolist()
        [1.53, -6.0, 1.53]
    """
    fold = _check_pairs(features, pairs, same, fold)
    features = np.asarray(features, np.float64)
    if head is not None:
        if head.alpha.shape != (features.shape[1],):
            raise ValueError(
                f"head: expected {features.shape[1]} weights, one per dimension of features, got {len(head.alpha)}"
            )
        given = head.scores(normalize(features) if head.normalize else features, pairs)
        return PairResult(given, kfold_accuracy(given, same, fold))
    unit = normalize(features)
    scores, accuracies, thresholds, heads = np.empty(len(pairs)), [], [], []
    for number in np.unique(fold):
        rest, part = fold != number, fold == number
        head = fit_head(unit, pairs[rest], same[rest], fold[rest])
        threshold = best_threshold(head.scores(unit, pairs[rest]), same[rest])
        scores[part] = head.scores(unit, pairs[part])
        accuracies.append(np.mean((scores[part] >= threshold) == same[part]))
        thresholds.append(threshold)
        heads.append(head)
    return PairResult(scores, FoldAccuracy(np.array(accuracies), np.array(thresholds)), heads=tuple(heads))


def lfw(
    features: np.ndarray,
    mirrored: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray | None = None,
    variant: LfwVariant = "insightface",
) -> PairResult:
    """Labeled Faces in the Wild, unrestricted with labeled outside data (Huang et al. 2007): 6,000 pairs, ten folds.

    "insightface" is the evaluation in ArcFace's code (Deng et al. 2019): sum of the features of image and mirror image,
    normalized; squared distance; thresholds 0 to 4 in steps of 0.01, the lowest of equally good ones; and TAR at
    FAR = 1e-3 with a threshold interpolated between steps of 0.001.
    "regularface" is that of RegularFace (Zhao et al. 2019) and SphereFace (Liu et al. 2017): concatenated features
    minus their mean over the pairs of the other folds; cosine; thresholds -1 to 1 in steps of 1e-4, the mean of equally
    good ones.

    Args:
        features: (num_images, D) from the network, not normalized.
        mirrored: (num_images, D) of the mirror images.
        pairs, same, fold: as for :func:`cosine_pairs`.

    Returns:
        Accuracy and threshold (squared distance or cosine) of each fold. Scores are cosines; with "regularface" the
        mean of the other folds is subtracted for each.

    Raises:
        ValueError: as :func:`cosine_pairs`; with "insightface" also if a fold has only genuine or only impostor pairs.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import lfw
        >>> features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> pairs = np.array([[0, 1], [0, 2], [2, 3], [1, 3]])
        >>> same, fold = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
        >>> mirrored = features + 0.01
        >>> result = lfw(features, mirrored, pairs, same, fold, variant="insightface")
        >>> result.folds.accuracy.tolist(), result.tar.tar.tolist()
        ([1.0, 1.0], [1.0, 1.0])
    """
    if variant not in LFW_FLIP:
        raise ValueError(f"variant: expected {' or '.join(LFW_FLIP)}, got {variant!r}")
    joined = join_mirror(features, mirrored, LFW_FLIP[variant])
    fold = _check_pairs(joined, pairs, same, fold)
    joined = np.asarray(joined, np.float64)
    return (_lfw_insightface if variant == "insightface" else _lfw_regularface)(joined, pairs, same, fold)


def _lfw_insightface(features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray) -> PairResult:
    unit = normalize(features)
    distance = np.square(unit[pairs[:, 0]] - unit[pairs[:, 1]]).sum(axis=1)
    coarse, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    rows, fewest = [], len(same)
    for number in np.unique(fold):
        rest, part = fold != number, fold == number
        genuine, impostor = np.sort(distance[rest & same]), np.sort(distance[rest & ~same])
        correct = np.searchsorted(genuine, coarse) + len(impostor) - np.searchsorted(impostor, coarse)
        best = coarse[np.argmax(correct)]
        # If no step reaches this FAR, np.interp returns the last step.
        limit = np.interp(INSIGHTFACE_FAR, np.searchsorted(impostor, fine) / len(impostor), fine)
        held_genuine, held_impostor = distance[part & same], distance[part & ~same]
        if not len(held_genuine) or not len(held_impostor):
            raise ValueError(f"same: expected genuine and impostor pairs in fold {number}, got one kind")
        accuracy = np.mean((distance[part] < best) == same[part])
        rows.append((accuracy, best, np.mean(held_genuine < limit), np.mean(held_impostor < limit), limit))
        fewest = min(fewest, len(impostor))
    accuracy, threshold, tar, far, limit = np.array(rows).T
    resolved = fewest * INSIGHTFACE_FAR >= 1
    return PairResult(1 - distance / 2, FoldAccuracy(accuracy, threshold), FoldTar(tar, far, limit, resolved))


def _lfw_regularface(features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray) -> PairResult:
    grid = np.arange(-10_000, 10_001) / 10_000
    scores, accuracies, thresholds = np.empty(len(pairs)), [], []
    for number in np.unique(fold):
        rest, part = fold != number, fold == number
        # Each image is weighted by the number of pairs that contain it.
        mean = np.bincount(pairs[rest].ravel(), minlength=len(features)) @ features / pairs[rest].size
        unit = normalize(features - mean)
        cosine = np.einsum("ij,ij->i", unit[pairs[:, 0]], unit[pairs[:, 1]])
        genuine, impostor = np.sort(cosine[rest & same]), np.sort(cosine[rest & ~same])
        # A score equal to the threshold is an error for both kinds, as in the published script.
        correct = len(genuine) - np.searchsorted(genuine, grid, "right") + np.searchsorted(impostor, grid, "left")
        threshold = grid[correct == correct.max()].mean()
        right = np.where(same, cosine > threshold, cosine < threshold)
        scores[part] = cosine[part]
        accuracies.append(right[part].mean())
        thresholds.append(threshold)
    return PairResult(scores, FoldAccuracy(np.array(accuracies), np.array(thresholds)))


def ytf(
    features: np.ndarray,
    video: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray | None = None,
    metric: Metric = "cosine",
    head: WeightedL1Head | None = None,
) -> PairResult:
    """YouTube Faces (Wolf et al. 2011): 5,000 pairs of videos, ten splits.

    The feature of a video is the mean of its frames' features. Pairs of videos are then scored as by
    :func:`cosine_pairs` or :func:`weighted_l1_pairs`.

    Args:
        features: (num_frames, D) from the network, with or without mirror features.
        video: (num_frames,) video index of each frame.
        pairs: (num_pairs, 2) video indices.
        same, fold: as for :func:`cosine_pairs`.
        metric: "cosine" or "weighted-l1".
        head: as for :func:`weighted_l1_pairs`.

    Raises:
        ValueError: as the function of the metric; also if ``metric`` is unknown, a video in ``pairs`` has no frame, or
            ``head`` is given for the cosine.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import ytf
        >>> frames = np.array([[1.0, 0.0], [0.8, 0.2], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> video = np.array([0, 0, 1, 2, 3])  # of each frame
        >>> pairs = np.array([[0, 1], [0, 2], [2, 3], [1, 3]])
        >>> same, fold = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
        >>> ytf(frames, video, pairs, same, fold).folds.accuracy.tolist()
        [1.0, 1.0]
    """
    check_choice("metric", metric, get_args(Metric))
    if metric == "cosine" and head is not None:
        raise ValueError("head: only with the metric weighted-l1")
    check_features("features", features)
    check_integers("video", video, (len(features),))
    check_integers("pairs", pairs, (None, 2))
    numbers, start, frames = np.unique(np.sort(video), return_index=True, return_counts=True)
    index = np.searchsorted(numbers, pairs).clip(max=len(numbers) - 1)
    if (missing := pairs[numbers[index] != pairs]).size:
        raise ValueError(f"video: expected a frame of every video in pairs, got none of video {missing[0]}")
    order = np.argsort(video, kind="stable")
    clips = (features[order[s : s + n]] for s, n in zip(start, frames, strict=True))
    means = np.stack([clip.mean(axis=0, dtype=np.float64) for clip in clips])
    if metric == "cosine":
        return cosine_pairs(means, index, same, fold)
    return weighted_l1_pairs(means, index, same, fold, head)


def _check_pairs(features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray | None) -> np.ndarray:
    """Validate the arrays; return the fold of each pair, by default ten unshuffled folds."""
    check_features("features", features)
    check_integers("pairs", pairs, (None, 2))
    if pairs.min() < 0 or pairs.max() >= len(features):
        raise ValueError(f"pairs: expected rows 0 to {len(features) - 1}, got {pairs.min()} to {pairs.max()}")
    fold = unshuffled_folds(len(pairs)) if fold is None else fold
    check_folds(same, fold, len(pairs))
    return fold

"""Named protocols: the features of a test set to the numbers that face-recognition papers report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.preprocessing import normalize
from torch import Tensor
from torch.nn import functional as F

from .array_checks import check_features, check_folds, check_integers
from .folds import unshuffled_folds
from .verification import (
    FoldAccuracy,
    TarAtFar,
    best_threshold,
    false_accepts,
    kfold_accuracy,
    tar_at_far,
)
from .weighted_l1 import WeightedL1Head, fit_head

Flip = Literal["none", "sum", "concat"]
Metric = Literal["cosine", "weighted-l1"]
LfwVariant = Literal["insightface", "regularface"]
LFW_FLIP: dict[LfwVariant, Flip] = {"insightface": "sum", "regularface": "concat"}
INSIGHTFACE_FAR = 1e-3
BLOCK_SCORES = 2**24  # probe-distractor scores held at once; as many as float32 still counts one by one
SCORE_BINS = 20_000  # of the distractors' scores, over the cosines from -1 to 1


class FoldTar(NamedTuple):
    """True accept rate on each fold at a threshold chosen on the other folds for a false accept rate."""

    tar: np.ndarray  # (folds,)
    far: np.ndarray  # (folds,) as it came out on the fold
    threshold: np.ndarray  # (folds,) squared distance
    resolved: bool  # the other folds have impostors enough to tell the rate from 0


class PairResult(NamedTuple):
    """A protocol of pairs and folds."""

    scores: np.ndarray  # (num_pairs,) cosine, or what the metric gives
    folds: FoldAccuracy
    tar: FoldTar | None = None  # where it is part of the protocol
    heads: tuple[WeightedL1Head, ...] = ()  # of each fold, where the metric is learned


class MegafaceResult(NamedTuple):
    """Identification and verification among distractors."""

    sizes: np.ndarray  # (num_sizes,) distractors in the gallery
    rank1: np.ndarray  # (num_sizes,) share of the ordered probe pairs that are hits
    tar: TarAtFar
    genuine: np.ndarray  # (num_genuine,) cosine of every pair of probes of one identity
    impostor: np.ndarray  # (SCORE_BINS,) cosine in the middle of each bin
    impostor_count: np.ndarray  # (SCORE_BINS,) probe-distractor pairs in the bin


def join_mirror(features: np.ndarray, mirrored: np.ndarray | None, flip: Flip) -> np.ndarray:
    """Features (n, D) and those of the mirror images as one: summed (n, D) or concatenated (n, 2 D).

    Raises:
        ValueError: `mirrored` is needed and missing, or is not of the features' shape.
    """
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
    """Accuracy over folds of the pairs' cosines, the threshold tried between all scores.

    Args:
        features: (num_images, D), of any norm; a zero row has cosine 0 to all.
        pairs: (num_pairs, 2) rows of `features`.
        same: (num_pairs,) bool, the two rows show one identity.
        fold: (num_pairs,) integers; ten unshuffled folds if not given.

    Raises:
        ValueError: an array is empty, of a wrong shape or type, not finite or out of range, or
            there are fewer pairs than folds.
    """
    fold = _check_pairs(features, pairs, same, fold)
    unit = normalize(np.asarray(features, np.float64))
    scores = np.einsum("ij,ij->i", unit[pairs[:, 0]], unit[pairs[:, 1]])
    return PairResult(scores, kfold_accuracy(scores, same, fold))


def weighted_l1_pairs(
    features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray | None = None
) -> PairResult:
    """Accuracy over folds under DeepFace's weighted L1 distance, learned without the fold it scores.

    For each fold a head (see `weighted_l1.fit_head`) is fitted on the pairs of the other folds, the
    features normalised before; it scores the fold, and gives those others the scores among which the
    threshold is chosen. So no label of a fold touches its scores or its threshold.

    Args:
        features, pairs, same, fold: as for `cosine_pairs`.

    Returns:
        Scores are log odds, those of every fold under its own head.

    Raises:
        ValueError: as `cosine_pairs`; also when there are fewer than three pairs of a kind beside a fold.
    """
    fold = _check_pairs(features, pairs, same, fold)
    unit = normalize(np.asarray(features, np.float64))
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


# How pairs of features are compared, under folds of them.
COMPARE: dict[Metric, Callable[..., PairResult]] = {"cosine": cosine_pairs, "weighted-l1": weighted_l1_pairs}


def lfw(
    features: np.ndarray,
    mirrored: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray | None = None,
    variant: LfwVariant = "insightface",
) -> PairResult:
    """Labeled Faces in the Wild, unrestricted with labelled outside data (Huang et al. 2007): 6,000 pairs, ten folds.

    "insightface" is what ArcFace's code evaluates (Deng et al. 2019): features of image and mirror
    image summed and normalised; squared distance, thresholds 0 to 4 in steps of 0.01, the lowest of
    the best; and TAR at FAR = 1e-3, its threshold interpolated between steps of 0.001.
    "regularface" is RegularFace's (Zhao et al. 2019) and SphereFace's (Liu et al. 2017): features
    concatenated, less their mean over the pairs of the other folds; cosine, thresholds -1 to 1 in
    steps of 1e-4, the mean of the best.

    Args:
        features: (num_images, D) as the network gives them, not normalised.
        mirrored: (num_images, D) of the mirror images.
        pairs, same, fold: as for `cosine_pairs`.

    Returns:
        Accuracy and threshold (squared distance or cosine) of each fold; the scores are cosines,
        with "regularface" each under the mean of the folds beside its own.

    Raises:
        ValueError: as `cosine_pairs`; "insightface" also when a fold has pairs of one kind only.
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
        # Where no step reaches this FAR it is the last one, which accepts as much as the grid can.
        limit = np.interp(INSIGHTFACE_FAR, np.searchsorted(impostor, fine) / len(impostor), fine)
        held_genuine, held_impostor = distance[part & same], distance[part & ~same]
        if not len(held_genuine) or not len(held_impostor):
            raise ValueError(f"same: expected pairs of one identity and of two in fold {number}, got one kind")
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
        # An image counts as often as the pairs show it.
        mean = np.bincount(pairs[rest].ravel(), minlength=len(features)) @ features / pairs[rest].size
        unit = normalize(features - mean)
        cosine = np.einsum("ij,ij->i", unit[pairs[:, 0]], unit[pairs[:, 1]])
        genuine, impostor = np.sort(cosine[rest & same]), np.sort(cosine[rest & ~same])
        # A score on the threshold is an error for either kind, as in the published script.
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
) -> PairResult:
    """YouTube Faces (Wolf et al. 2011): 5,000 pairs of videos, ten splits.

    A video's feature is the mean of its frames' features, normalised after; videos are compared by
    cosine, the threshold tried between all scores of the other splits, or by a metric learned on them.

    Args:
        features: (num_frames, D) as the network gives them, mirror features joined or not.
        video: (num_frames,) number of each frame's video.
        pairs: (num_pairs, 2) numbers of videos.
        same, fold: as for `cosine_pairs`.
        metric: cosine, or weighted-l1 as in `weighted_l1_pairs`.

    Raises:
        ValueError: as the metric's function; also when a video in `pairs` has no frame.
    """
    check_features("features", features)
    check_integers("video", video, (len(features),))
    check_integers("pairs", pairs, (None, 2))
    numbers, start, frames = np.unique(np.sort(video), return_index=True, return_counts=True)
    place = np.searchsorted(numbers, pairs).clip(max=len(numbers) - 1)
    if (missing := pairs[numbers[place] != pairs]).size:
        raise ValueError(f"video: expected a frame of every video in pairs, got none of video {missing[0]}")
    order = np.argsort(video, kind="stable")
    clips = (features[order[s : s + n]] for s, n in zip(start, frames, strict=True))
    means = np.stack([clip.mean(axis=0, dtype=np.float64) for clip in clips])
    return COMPARE[metric](means, place, same, fold)


@torch.no_grad()
def megaface(
    probes: np.ndarray,
    identity: np.ndarray,
    distractors: np.ndarray,
    sizes: Sequence[int] | None = None,
    far: float = 1e-6,
    device: torch.device | str = "cpu",
    block_scores: int = BLOCK_SCORES,
) -> MegafaceResult:
    """MegaFace (Kemelmacher-Shlizerman et al. 2016): probes among up to a million distractors.

    Identification: for each ordered pair of images of one identity, the first is searched for in a
    gallery of the second and the distractors; it is a hit when the second's cosine is above that of
    every distractor (a tie is a miss). Verification: genuine pairs are the pairs of probes of one
    identity, impostors all pairs of a probe and a distractor.

    Distractors go through in blocks of `block_scores` scores at most; kept of them are each probe's
    best, the `far` highest share of all, which decides the TAR, and counts in bins for the curve.

    Args:
        probes: (num_probes, D), of any norm.
        identity: (num_probes,) integers.
        distractors: (num_distractors, D), of identities that the probes do not show; may be a memory map.
        sizes: how many of the distractors, from the first, make the galleries; powers of ten and all
            of them if not given.
        far: false accept rate, 0 to 1.
        device: where the products are computed.

    Raises:
        ValueError: an array is empty, of a wrong shape or type or not finite, no identity has two
            probes, or a size is above the number of distractors.
    """
    check_features("probes", probes)
    check_integers("identity", identity, (len(probes),))
    check_features("distractors", distractors, probes.shape[1], check_values=False)  # block by block
    count = len(distractors)
    if sizes is None:
        sizes = [10**n for n in range(1, 1 + math.ceil(math.log10(count)))]
        sizes = [size for size in sizes if size < count] + [count]
    if not len(sizes) or min(sizes) < 1 or max(sizes) > count:
        raise ValueError(f"sizes: expected galleries of 1 to {count} distractors, got {list(sizes)}")
    sizes = np.unique(sizes)
    order = np.argsort(identity, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    groups = [members for members in groups if len(members) >= 2]
    if not groups:
        raise ValueError("identity: expected one with two probes or more, got none")

    unit = _unit(probes, device)
    kept = false_accepts(far, len(unit) * count) + 1  # the first that may not pass is the threshold
    top = torch.empty(0, device=device, dtype=unit.dtype)
    bins = torch.zeros(SCORE_BINS, dtype=torch.float64, device=device)
    best = torch.full((len(unit),), -torch.inf, device=device, dtype=unit.dtype)
    best_among = []  # of each size, (num_probes,)
    edges = sorted({*range(0, count, max(1, block_scores // len(unit))), *sizes.tolist(), count})
    for start, stop in pairwise(edges):
        block = distractors[start:stop]
        check_features("distractors", block)
        scores = unit @ _unit(block, device).to(unit.dtype).T
        best = torch.maximum(best, scores.amax(dim=1))
        if stop in sizes:
            best_among.append(best)
        bins += torch.histc(scores.clamp(-1, 1), SCORE_BINS, -1, 1)
        flat = scores.flatten()
        top = torch.cat([top, flat if len(top) < kept else flat[flat > top.min()]])
        if len(top) > kept:
            top = top.topk(kept).values

    hits, genuine = np.zeros(len(sizes)), []
    for members in groups:
        cosine = unit[members] @ unit[members].T
        others = ~torch.eye(len(members), dtype=torch.bool, device=device)
        hits += [float(((cosine > limit[members, None]) & others).sum()) for limit in best_among]
        genuine.append(cosine[others.triu()].cpu().numpy())
    genuine = np.concatenate(genuine)
    middle = (np.arange(SCORE_BINS) + 0.5) * (2 / SCORE_BINS) - 1
    tar = tar_at_far(genuine, top.cpu().numpy(), far, len(unit) * count)
    return MegafaceResult(sizes, hits / (2 * len(genuine)), tar, genuine, middle, bins.cpu().numpy())


def _unit(features: np.ndarray, device: torch.device | str) -> Tensor:
    """Rows of unit norm, in float64 if they are and in float32 otherwise."""
    kind = np.float64 if features.dtype == np.float64 else np.float32
    return F.normalize(torch.from_numpy(np.array(features, kind)).to(device))


def _check_pairs(features: np.ndarray, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray | None) -> np.ndarray:
    """The fold of each pair; raises ValueError where the arrays do not fit."""
    check_features("features", features)
    check_integers("pairs", pairs, (None, 2))
    if pairs.min() < 0 or pairs.max() >= len(features):
        raise ValueError(f"pairs: expected rows 0 to {len(features) - 1}, got {pairs.min()} to {pairs.max()}")
    fold = unshuffled_folds(len(pairs)) if fold is None else fold
    check_folds(same, fold, len(pairs))
    return fold

"""Verification: which pairs are compared, and what their scores amount to: accuracy, ROC, error rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from sklearn.metrics import auc, roc_curve

from .array_checks import check_folds, check_scores
from .data.base import DataError
from .wording import counted, identities


class Pairs(NamedTuple):
    """Image pairs in the order of the folds, as LFW lists them."""

    indices: np.ndarray  # (num_pairs, 2) rows of the test embeddings
    same: np.ndarray  # (num_pairs,) bool: both images show one identity
    fold: np.ndarray  # (num_pairs,) number of the fold
    folds_disjoint: bool  # no identity appears in two folds


class FoldAccuracy(NamedTuple):
    """Accuracy and chosen threshold of every fold."""

    accuracy: np.ndarray  # (folds,)
    threshold: np.ndarray  # (folds,)


class RocCurve(NamedTuple):
    """True accept rate over false accept rate, both ascending."""

    far: np.ndarray
    tar: np.ndarray


class TarAtFar(NamedTuple):
    """True accept rate at a false accept rate."""

    far: float  # asked for
    tar: float
    threshold: float  # a pair is accepted when its score is above it; -inf: all are
    smallest_far: float  # one false accept; what is asked for below it means none

    @property
    def resolved(self) -> bool:
        """Whether there are impostors enough to tell `far` from 0."""
        return self.far >= self.smallest_far


@dataclass(frozen=True)
class ScoreSummary:
    """What the scores of genuine pairs (one identity) and impostor pairs (two) amount to."""

    genuine: np.ndarray  # (num_genuine,) scores, higher is more alike
    impostor: np.ndarray  # (num_scores,)
    impostor_count: np.ndarray | None  # (num_scores,) pairs that have each score; None: one each
    roc: RocCurve
    auc: float
    equal_error_rate: float
    tar: TarAtFar


def make_pairs(labels: np.ndarray, num_pairs: int, folds: int, seed: int) -> Pairs:
    """Draw pairs as LFW does: half of each fold one identity, half two, no pair twice.

    The identities are divided among the folds where there are enough of them (two per fold, each
    with two images); otherwise all folds draw from all identities. Where the images do not give
    `num_pairs` unequal pairs, there are fewer, still half and half.
    """
    rng = np.random.default_rng(seed)
    present, counts = np.unique(labels, return_counts=True)
    rich = rng.permutation(present[counts >= 2])
    if len(present) < 2 or not len(rich):
        raise DataError(
            "verification needs two identities or more, one of them with two images; "
            f"there are images of {identities(len(present))}, {len(rich):,} of them with two or more"
        )
    disjoint = len(rich) >= 2 * folds
    if disjoint:
        groups = np.array_split(rich, folds)
        pools = [_draw_pairs(labels, group, num_pairs // (2 * folds), rng) for group in groups]
    else:
        positive, negative = _draw_pairs(labels, present, num_pairs // 2, rng)
        pools = list(zip(np.array_split(positive, folds), np.array_split(negative, folds), strict=True))
    if sum(len(positive) for positive, _ in pools) < 2:
        raise DataError("verification needs two pairs of one identity or more; the images give one")
    indices = [half for pool in pools for half in pool]
    same = [np.full(len(half), i == 0) for pool in pools for i, half in enumerate(pool)]
    fold = [np.full(len(half), f) for f, pool in enumerate(pools) for half in pool]
    return Pairs(np.concatenate(indices), np.concatenate(same), np.concatenate(fold), disjoint)


def kfold_accuracy(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> FoldAccuracy:
    """Accuracy on each fold at the threshold that is best on the other folds together.

    A pair is accepted when its score reaches the threshold. Thresholds are tried between all scores
    of the other folds; among equally good ones the highest is taken.

    Args:
        scores: (num_pairs,), higher is more alike.
        same: (num_pairs,) bool, the two images show one identity.
        fold: (num_pairs,) integers.

    Raises:
        ValueError: a score is not finite, shapes differ, or the folds allow no choice.
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
    """The threshold that decides most pairs rightly, as `kfold_accuracy` tries them; there are pairs of both kinds."""
    far, tar, candidates = roc_curve(same, scores, drop_intermediate=False)
    candidates[0] = np.nextafter(candidates[1], np.inf)  # accepts none, as the infinity there
    best = int(np.argmax(tar * np.count_nonzero(same) + (1 - far) * np.count_nonzero(~same)))
    threshold = candidates[best]
    if 0 < best < len(candidates) - 1:
        # Halfway to the next score below, or a held-out pair hardly less alike would be refused.
        between = (threshold + candidates[best + 1]) / 2
        threshold = between if between > candidates[best + 1] else threshold
    return float(threshold)


def summarize(
    genuine: np.ndarray, impostor: np.ndarray, tar: TarAtFar, impostor_count: np.ndarray | None = None
) -> ScoreSummary:
    """ROC, AUC and equal error rate of the scores; the arguments are those of `roc`."""
    curve = roc(genuine, impostor, impostor_count)
    return ScoreSummary(
        genuine, impostor, impostor_count, curve, float(auc(curve.far, curve.tar)), equal_error_rate(curve), tar
    )


def summarize_pairs(scores: np.ndarray, same: np.ndarray, far: float) -> ScoreSummary:
    """All measures of the scores (num_pairs,) of pairs of one identity, `same`, and of two; TAR at `far`."""
    genuine, impostor = scores[same], scores[~same]
    return summarize(genuine, impostor, tar_at_far(genuine, impostor, far))


def score_values(summary: ScoreSummary) -> dict[str, Any]:
    """What the reports of a training and of an evaluation say of the scores, as plain values."""
    tar = summary.tar
    return {
        "genuine": len(summary.genuine),
        "impostors": round(1 / tar.smallest_far),
        "auc": summary.auc,
        "equal_error_rate": summary.equal_error_rate,
        "far": tar.far,
        "tar_at_far": tar.tar,
        "threshold_at_far": tar.threshold if math.isfinite(tar.threshold) else None,
        "far_resolved": tar.resolved,
    }


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the printed tables for `score_values`."""
    unresolved = "" if scores["far_resolved"] else f" (none of {counted(scores['impostors'], 'impostor')} may pass)"
    return [
        (f"TAR at FAR = {scores['far']:g}", f"{scores['tar_at_far']:.2%}{unresolved}"),
        ("equal error rate", f"{scores['equal_error_rate']:.2%}"),
        ("area under the ROC curve", f"{scores['auc']:.4f}"),
    ]


def results_table(title: str) -> Table:
    """An empty table of names and values; on a narrow screen only the names are wrapped."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    return table


def roc(genuine: np.ndarray, impostor: np.ndarray, impostor_count: np.ndarray | None = None) -> RocCurve:
    """True accept rate over false accept rate, one point per distinct score: ties are accepted together.

    Args:
        genuine: (num_genuine,) scores of pairs of one identity, higher is more alike.
        impostor: (num_scores,) scores of pairs of two identities.
        impostor_count: (num_scores,) how many pairs have each; one if not given.

    Raises:
        ValueError: there are no scores of one kind, or one is not finite.
    """
    check_scores("genuine", genuine)
    check_scores("impostor", impostor)
    same = np.repeat([True, False], [len(genuine), len(impostor)])
    weight = None if impostor_count is None else np.concatenate([np.ones(len(genuine)), impostor_count])
    far, tar, _ = roc_curve(same, np.concatenate([genuine, impostor]), sample_weight=weight, drop_intermediate=False)
    return RocCurve(far, tar)


def equal_error_rate(curve: RocCurve) -> float:
    """The rate at which false accepts equal false rejects, on straight lines between the curve's points."""
    return float(np.interp(0.0, curve.far - (1 - curve.tar), curve.far))


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float, num_impostors: int | None = None) -> TarAtFar:
    """Best true accept rate at a false accept rate of `far` or less.

    With n impostors the rates are multiples of 1/n: a `far` below 1/n is answered for no false
    accept at all, and `resolved` is False. Impostors tied with the first one that must not pass
    are kept out with it.

    Args:
        genuine: (num_genuine,) scores of pairs of one identity, higher is more alike.
        impostor: scores of pairs of two identities; all, or more of the highest than may pass.
        far: share of the impostors that may pass, 0 to 1.
        num_impostors: how many there are, where `impostor` holds only the highest.

    Raises:
        ValueError: there are no scores of one kind, one is not finite, or `far` is not a rate.
    """
    check_scores("genuine", genuine)
    check_scores("impostor", impostor)
    total = len(impostor) if num_impostors is None else num_impostors
    passing = false_accepts(far, total)
    if passing >= total:
        threshold = -math.inf
    elif passing >= len(impostor):
        raise ValueError(f"impostor: expected the {passing + 1} highest scores or more, got {len(impostor)}")
    else:
        place = len(impostor) - 1 - passing
        threshold = float(np.partition(impostor, place)[place])
    return TarAtFar(far, float(np.mean(genuine > threshold)), threshold, 1 / total)


def false_accepts(far: float, num_impostors: int) -> int:
    """The most impostors that may pass at a false accept rate of `far`."""
    if not 0 <= far <= 1:
        raise ValueError(f"far: expected a rate from 0 to 1, got {far}")
    passing = math.floor(far * num_impostors)
    return passing + ((passing + 1) / num_impostors <= far)  # 0.29 * 100 is 28.999...


def _draw_pairs(
    labels: np.ndarray, identities: np.ndarray, per_kind: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Equally many pairs of one identity and of two, at most `per_kind` of each."""
    images = [np.flatnonzero(labels == identity) for identity in identities]
    rich = [members for members in images if len(members) >= 2]

    def one_identity() -> np.ndarray:
        return rng.choice(rich[rng.integers(len(rich))], 2, replace=False)

    def two_identities() -> np.ndarray:
        first, second = rng.choice(len(images), 2, replace=False)
        return np.array([rng.choice(images[first]), rng.choice(images[second])])

    positive = _distinct(one_identity, per_kind)
    negative = _distinct(two_identities, per_kind)
    kept = min(len(positive), len(negative))
    return positive[:kept], negative[:kept]


def _distinct(draw, wanted: int) -> np.ndarray:
    """Up to `wanted` unequal pairs; gives up when draws hardly ever bring a new one."""
    pairs: dict[tuple[int, int], None] = {}  # keeps the order of drawing
    for _ in range(20 * wanted):
        if len(pairs) == wanted:
            break
        pairs[tuple(sorted(draw().tolist()))] = None
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)

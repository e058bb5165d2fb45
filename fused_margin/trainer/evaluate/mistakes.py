"""The most confident mistakes of an evaluation: wrongly accepted and rejected pairs, searches that missed, identities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from fused_margin.evaluation import IdentificationResult, MegafaceResult, PairResult

MAX_SHOWN = 8  # mistakes of each kind in a report


class ScoredPairs(NamedTuple):
    """Pairs of a protocol with the scores and decisions of the network."""

    pairs: np.ndarray  # (num_pairs, 2) rows of features, or video indices
    same: np.ndarray  # (num_pairs,) bool
    scores: np.ndarray  # (num_pairs,)
    threshold: np.ndarray  # (num_pairs,) score of the pair's fold above which pairs are accepted
    accepted: np.ndarray  # (num_pairs,) bool

    @property
    def false_accepts(self) -> np.ndarray:
        """Positions of accepted impostor pairs, the highest score first."""
        wrong = np.flatnonzero(self.accepted & ~self.same)
        return wrong[np.argsort(-self.scores[wrong], kind="stable")]

    @property
    def false_rejects(self) -> np.ndarray:
        """Positions of rejected genuine pairs, the lowest score first."""
        wrong = np.flatnonzero(~self.accepted & self.same)
        return wrong[np.argsort(self.scores[wrong], kind="stable")]


def scored_pairs(
    result: PairResult, pairs: np.ndarray, same: np.ndarray, fold: np.ndarray, protocol: str
) -> ScoredPairs:
    """The pairs with the decisions at the thresholds of their folds; `protocol` as `ProtocolOptions.name`."""
    _, number = np.unique(fold, return_inverse=True)
    threshold = result.folds.threshold[number]
    if protocol == "lfw-insightface":  # thresholds are squared distances, scores are cosines
        threshold = 1 - threshold / 2
    strict = protocol.startswith("lfw")  # LFW's variants reject a score that equals the threshold
    accepted = result.scores > threshold if strict else result.scores >= threshold
    return ScoredPairs(pairs, same, result.scores, threshold, accepted)


class Miss(NamedTuple):
    """A search that found a distractor instead of the other image of the probe's identity."""

    probe: int  # row of the probes
    mate: int  # row of the probes
    distractor: int  # row of the distractors
    mate_cosine: float
    distractor_cosine: float


def worst_misses(probes: np.ndarray, identity: np.ndarray, result: MegafaceResult) -> list[Miss]:
    """The misses whose distractor exceeds the mate by most, the largest excess first; at most one of each probe."""
    unit = normalize(np.asarray(probes, np.float32))
    order = np.argsort(identity, kind="stable")
    misses = []
    for members in np.split(order, np.flatnonzero(np.diff(identity[order])) + 1):
        cosine = unit[members] @ unit[members].T
        np.fill_diagonal(cosine, np.inf)  # a probe is not its own mate
        mate = cosine.argmin(axis=1)
        for row, probe in enumerate(members.tolist()):
            found, of_mate = float(result.nearest_cosine[probe]), float(cosine[row, mate[row]])
            if found >= of_mate:
                misses.append(Miss(probe, int(members[mate[row]]), int(result.nearest[probe]), of_mate, found))
    return sorted(misses, key=lambda miss: miss.mate_cosine - miss.distractor_cosine)[:MAX_SHOWN]


class Misidentified(NamedTuple):
    """A probe whose identification is wrong, and the enrolled images that are most similar to it."""

    probe: int  # row of the probes
    best: int  # row of the enrolled images, of the best identity
    mate: int | None  # row of the enrolled images, of its own identity
    best_score: float
    mate_score: float | None


class IdentificationMistakes(NamedTuple):
    """The numbers of mistakes of each kind, and the most confident of them."""

    num_wrong: int  # mated probes whose best identity is another one
    num_rejected: int  # mated probes whose best identity is theirs, with a score below the threshold
    num_accepted: int  # non-mated probes with a score at or above the threshold
    wrong: list[Misidentified]  # the highest score first
    rejected: list[Misidentified]  # the lowest score first
    accepted: list[Misidentified]  # the highest score first


def nearest_member(probe: np.ndarray, enrolled: np.ndarray, identity: np.ndarray, number: int) -> int:
    """The row of the enrolled images of identity `number` that is most similar to a probe (D,)."""
    members = np.flatnonzero(identity == number)
    unit = normalize(np.asarray(enrolled[members], np.float64))
    return int(members[(unit @ np.asarray(probe, np.float64)).argmax()])


def identification_mistakes(
    probes: np.ndarray, enrolled: np.ndarray, identity: np.ndarray, result: IdentificationResult, threshold: float
) -> IdentificationMistakes:
    """The mistakes at rank 1 and a threshold.

    Args:
        probes: (num_probes, D).
        enrolled: (num_enrolled, D) features of the images in the gallery.
        identity: (num_enrolled,) index of each one's identity.
        result: of the probes.
        threshold: scores at or above it are accepted.
    """
    is_wrong = result.is_mated & (result.best != result.mate)
    is_rejected = result.is_mated & ~is_wrong & (result.best_score < threshold)
    is_accepted = ~result.is_mated & (result.best_score >= threshold)

    def nearest(probe: int, number: int) -> int:
        return nearest_member(probes[probe], enrolled, identity, number)

    def listed(chosen: np.ndarray, sign: int) -> list[Misidentified]:
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(sign * result.best_score[rows], kind="stable")][:MAX_SHOWN]
        return [
            Misidentified(
                row,
                nearest(row, result.best[row]),
                nearest(row, result.mate[row]) if result.is_mated[row] else None,
                float(result.best_score[row]),
                float(result.mate_score[row]) if result.is_mated[row] else None,
            )
            for row in rows.tolist()
        ]

    return IdentificationMistakes(
        num_wrong=int(np.count_nonzero(is_wrong)),
        num_rejected=int(np.count_nonzero(is_rejected)),
        num_accepted=int(np.count_nonzero(is_accepted)),
        wrong=listed(is_wrong, -1),
        rejected=listed(is_rejected, 1),
        accepted=listed(is_accepted, -1),
    )

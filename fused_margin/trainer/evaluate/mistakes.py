"""The most confident mistakes of an evaluation: wrongly accepted and rejected pairs, and searches that missed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from fused_margin.evaluation import MegafaceResult, PairResult

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

"""Identification: closed set (rank-k, CMC) and open set (DIR at FAR, FPIR and FNIR) of probes in a gallery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .checks import check_count, check_features, check_labels, check_threshold
from .gallery import Gallery
from .gallery_search import WORKSPACE_MB, search_gallery
from .identity_scores import mate_ranks, mate_scores, probe_blocks
from .metrics import false_accepts
from .nearest_rows import Progress


class ThresholdAtFpir(NamedTuple):
    """A threshold for a wanted false-positive identification rate: of :meth:`IdentificationResult.threshold_at_fpir`.

    Attributes:
        fpir: the wanted rate.
        threshold: scores at or above it are accepted; -inf accepts all.
        measured: the rate at this threshold.
        smallest_fpir: the rate of one false positive. A lower ``fpir`` allows none.

    Examples:
        >>> from fused_margin.evaluation import ThresholdAtFpir
        >>> ThresholdAtFpir(fpir=1e-3, threshold=0.4, measured=0.0, smallest_fpir=1e-2).resolved  # 100 non-mated probes
        False
    """

    fpir: float
    threshold: float
    measured: float
    smallest_fpir: float

    @property
    def resolved(self) -> bool:
        """Whether there are enough non-mated probes to distinguish ``fpir`` from 0."""
        return self.fpir >= self.smallest_fpir


class DirAtFar(NamedTuple):
    """Detection and identification rate at a false alarm rate: of :meth:`IdentificationResult.dir_at_far`.

    Attributes:
        far: the wanted false alarm rate, which is the FPIR.
        dir: the detection and identification rate.
        rank: the rank that counts as identified; None: any.
        threshold: scores at or above it are accepted; -inf accepts all.
        smallest_far: the rate of one false alarm. A lower ``far`` allows none.

    Examples:
        >>> from fused_margin.evaluation import DirAtFar
        >>> DirAtFar(far=0.01, dir=0.9, rank=1, threshold=0.4, smallest_far=0.001).resolved
        True
    """

    far: float
    dir: float
    rank: int | None
    threshold: float
    smallest_far: float

    @property
    def resolved(self) -> bool:
        """Whether there are enough non-mated probes to distinguish ``far`` from 0."""
        return self.far >= self.smallest_far


class OperatingCurve(NamedTuple):
    """Error rates over the threshold: of :meth:`IdentificationResult.operating_curve`.

    Attributes:
        threshold: (n,) descending, from inf, which accepts none.
        fpir: (n,) false-positive identification rates, ascending.
        fnir: (n,) false-negative identification rates, descending. The DIR is ``1 - fnir``.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import OperatingCurve
        >>> threshold, fpir, fnir = np.array([np.inf, 0.8]), np.array([0.0, 0.0]), np.array([1.0, 0.5])
        >>> (1 - OperatingCurve(threshold, fpir, fnir).fnir).tolist()
        [0.0, 0.5]
    """

    threshold: np.ndarray
    fpir: np.ndarray
    fnir: np.ndarray


@dataclass(frozen=True, eq=False)
class IdentificationResult:
    """Candidates of all probes, and the rates of closed-set and open-set identification: of :func:`identification`.

    A probe is mated (known) if its identity is in the gallery. This identity is its mate. The other probes are
    non-mated (unknown).

    Attributes:
        names: (K,) names of the gallery.
        mate: (P,) int64 index of each probe's identity in ``names``; -1 for a non-mated probe.
        mate_score: (P,) float64 score of the mate; NaN for a non-mated probe.
        rank: (P,) int64 rank of the mate, from 1; 0 for a non-mated probe, and ``max_rank + 1`` for all lower ranks.
        best: (P,) int64 index of the best identity in ``names``.
        best_score: (P,) float64 score of it.
        max_rank: largest rank that is known.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, identification
        >>> gallery = enroll(np.eye(3), ["Ann", "Bob", "Eve"])
        >>> probes = np.array([[0.9, 0.1, 0.1], [0.6, 0.5, 0.0], [0.4, 0.3, 0.5]])
        >>> result = identification(probes, ["Ann", "Bob", "Kim"], gallery)
        >>> result.cmc.tolist()
        [0.5, 1.0, 1.0]
        >>> result.rank.tolist(), result.names[result.best].tolist()
        ([1, 2, 0], ['Ann', 'Ann', 'Eve'])
    """

    names: np.ndarray
    mate: np.ndarray
    mate_score: np.ndarray
    rank: np.ndarray
    best: np.ndarray
    best_score: np.ndarray
    max_rank: int

    @property
    def is_mated(self) -> np.ndarray:
        """(P,) bool, whether each probe's identity is in the gallery."""
        return self.mate >= 0

    @property
    def cmc(self) -> np.ndarray:
        """The cumulative match characteristic (max_rank,), the identification rates of ranks 1 to ``max_rank``.

        Raises:
            ValueError: no probe is mated.
        """
        ranks = self.rank[self._mated()]
        return np.cumsum(np.bincount(ranks, minlength=self.max_rank + 2)[1 : self.max_rank + 1]) / len(ranks)

    def rank_rate(self, rank: int = 1) -> float:
        """The closed-set identification rate: the share of mated probes whose mate is among the ``rank`` best.

        Args:
            rank: 1 to ``max_rank``.

        Raises:
            ValueError: no probe is mated, or ``rank`` is out of range.
        """
        return self.dir(-math.inf, self._checked_rank(rank))

    def fpir(self, threshold: float) -> float:
        """The false-positive identification rate: the share of non-mated probes with a candidate at or above a threshold.

        See ISO/IEC 19795-1. A score at the threshold counts, as in NIST's evaluations of one-to-many face recognition.

        Raises:
            ValueError: all probes are mated, or ``threshold`` is NaN.
        """
        check_threshold(threshold)
        return float(np.mean(self.best_score[self._non_mated()] >= threshold))

    def fnir(self, threshold: float, rank: int | None = 1) -> float:
        """The false-negative identification rate: the share of mated probes whose mate is not returned.

        FNIR(N, R, T) of ISO/IEC 19795-1 for a gallery of N identities: the mate is not among the R best candidates, or
        its score is below T.

        Args:
            threshold: T.
            rank: R, 1 to ``max_rank``; None: any rank.

        Raises:
            ValueError: no probe is mated, ``rank`` is out of range, or ``threshold`` is NaN.
        """
        return 1 - self.dir(threshold, rank)

    def dir(self, threshold: float, rank: int | None = 1) -> float:
        """The detection and identification rate: the share of mated probes whose mate is returned.

        The mate is among the ``rank`` best, and its score is at or above the threshold. See Phillips, Grother and
        Micheals, Evaluation Methods in Face Recognition (Handbook of Face Recognition).

        Args:
            threshold: of the score.
            rank: 1 to ``max_rank``; None: any rank.

        Raises:
            ValueError: as :meth:`fnir`.
        """
        check_threshold(threshold)
        mated = self._mated()
        return float(np.mean((self.mate_score[mated] >= threshold) & self._is_ranked(mated, rank)))

    def threshold_at_fpir(self, fpir: float) -> ThresholdAtFpir:
        """The smallest threshold with a false-positive identification rate of at most ``fpir``.

        Non-mated probes that tie with the best rejected one are rejected too.

        Args:
            fpir: a rate from 0 to 1.

        Raises:
            ValueError: all probes are mated, or ``fpir`` is not a rate.
        """
        scores = self.best_score[self._non_mated()]
        if not 0 <= fpir <= 1:
            raise ValueError(f"fpir: expected a rate from 0 to 1, got {fpir}")
        passing = false_accepts(fpir, len(scores))
        threshold = -math.inf
        if passing < len(scores):
            index = len(scores) - 1 - passing
            threshold = float(np.nextafter(np.partition(scores, index)[index], math.inf))  # above the rejected score
        return ThresholdAtFpir(fpir, threshold, self.fpir(threshold), 1 / len(scores))

    def dir_at_far(self, far: float, rank: int | None = 1) -> DirAtFar:
        """The highest detection and identification rate at a false alarm rate of at most ``far``.

        The false alarm rate of an open set is its FPIR. See Phillips, Grother and Micheals, and the IJB benchmarks,
        which report it as TPIR at FPIR.

        Args:
            far: a rate from 0 to 1.
            rank: as for :meth:`dir`.

        Raises:
            ValueError: no probe or every probe is mated, ``far`` is not a rate, or ``rank`` is out of range.

        Examples:
            >>> import numpy as np
            >>> from fused_margin.evaluation import enroll, identification
            >>> probes = np.array([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8]])
            >>> result = identification(probes, ["Ann", "Ann", "Kim"], enroll(np.eye(2), ["Ann", "Bob"]))
            >>> found = result.dir_at_far(0.01)
            >>> found.dir, round(found.threshold, 3), found.resolved
            (0.5, 0.8, False)
        """
        if not 0 <= far <= 1:
            raise ValueError(f"far: expected a rate from 0 to 1, got {far}")
        at = self.threshold_at_fpir(far)
        return DirAtFar(far, self.dir(at.threshold, rank), rank, at.threshold, at.smallest_fpir)

    def operating_curve(self, rank: int | None = 1, max_points: int | None = None) -> OperatingCurve:
        """FPIR and FNIR at every distinct score of a mate or of the best candidate of a non-mated probe.

        Args:
            rank: of :meth:`fnir`.
            max_points: largest number of points, at least 2, chosen evenly among all thresholds. None: all.

        Raises:
            ValueError: no probe or every probe is mated, or an argument is out of range.
        """
        if max_points is not None:
            check_count("max_points", max_points)
            if max_points < 2:
                raise ValueError(f"max_points: expected at least 2, got {max_points}")
        mated, non_mated = self._mated(), self._non_mated()
        found = np.sort(self.mate_score[mated][self._is_ranked(mated, rank)])
        false = np.sort(self.best_score[non_mated])
        threshold = np.append(np.unique(np.concatenate([found, false])), math.inf)[::-1]
        if max_points is not None and len(threshold) > max_points:
            threshold = threshold[np.linspace(0, len(threshold) - 1, max_points).round().astype(int)]
        detected = len(found) - np.searchsorted(found, threshold)  # at or above the threshold
        alarms = len(false) - np.searchsorted(false, threshold)
        return OperatingCurve(threshold, alarms / len(false), 1 - detected / np.count_nonzero(mated))

    def _mated(self) -> np.ndarray:
        if not self.is_mated.any():
            raise ValueError("labels: expected a probe of an identity in the gallery, got none; this rate is undefined")
        return self.is_mated

    def _non_mated(self) -> np.ndarray:
        if self.is_mated.all():
            raise ValueError(
                "labels: expected a probe of an identity outside the gallery, got none; this rate is undefined"
            )
        return ~self.is_mated

    def _checked_rank(self, rank: int) -> int:
        check_count("rank", rank, self.max_rank, "the max_rank of this result")
        return rank

    def _is_ranked(self, mated: np.ndarray, rank: int | None) -> np.ndarray:
        """Whether the mate of each mated probe is among the `rank` best."""
        ranks = self.rank[mated]
        return np.ones(len(ranks), bool) if rank is None else ranks <= self._checked_rank(rank)


def identification(
    probes: np.ndarray,
    labels: np.ndarray | Sequence[str] | Sequence[int],
    gallery: Gallery,
    *,
    max_rank: int | None = 20,
    device: torch.device | str = "cpu",
    workspace_mb: float = WORKSPACE_MB,
    progress: Progress | None = None,
) -> IdentificationResult:
    """Search a gallery for every probe, to measure identification.

    Args:
        probes: (P, D) of any norm; may be a memory map.
        labels: (P,) texts or integers, as the names of the gallery are: the identity of each probe. Probes of
            identities outside the gallery are unknown (open set).
        gallery: the enrolled identities.
        max_rank: largest rank of a mate to find; the number of identities, if that is smaller. None finds every rank by
            matrix products in float64 of the mated probes with all templates, in blocks. These are slower than the
            search of :func:`search_gallery` for up to 32 templates.
        device, workspace_mb: as for :func:`search_gallery`.
        progress: called with the number of probes that are done and the number of all. With ``max_rank=None``, mated
            probes count twice.

    Raises:
        ValueError: as :func:`search_gallery`, ``labels`` has a wrong shape or kind, or ``max_rank`` is not positive.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, identification
        >>> gallery = enroll(np.eye(3), ["Ann", "Bob", "Eve"])
        >>> probes = np.array([[0.9, 0.1, 0.1], [0.6, 0.5, 0.0], [0.4, 0.3, 0.5]])
        >>> result = identification(probes, ["Ann", "Bob", "Kim"], gallery)
        >>> result.rank_rate(1), result.rank_rate(2)
        (0.5, 1.0)
        >>> result.fpir(0.5), result.fnir(0.5)  # Kim is taken for Eve; Bob is not the best candidate of his image
        (1.0, 0.5)
    """
    check_features("probes", probes, gallery.templates.shape[1])
    mate = gallery.index_of(check_labels("labels", labels, len(probes)))
    is_mated = mate >= 0
    count = len(gallery.names)
    if max_rank is not None:
        check_count("max_rank", max_rank)
    limit = count if max_rank is None else min(max_rank, count)
    k = 1 if max_rank is None else limit
    mated = np.flatnonzero(is_mated)
    later = len(mated) if max_rank is None else 0  # probes that count a second time

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total + later)

    ranking = search_gallery(probes, gallery, k, device=device, workspace_mb=workspace_mb, progress=report)
    is_mate = ranking.identity == mate[:, None]
    place, is_ranked = is_mate.argmax(axis=1), is_mate.any(axis=1)
    mate_score = mate_scores(probes, gallery, mate, workspace_mb)
    rank = np.where(is_ranked, place + 1, np.where(is_mated, limit + 1, 0))
    if max_rank is None:
        for block in probe_blocks(len(mated), gallery, workspace_mb):
            rows = mated[block]
            rank[rows] = mate_ranks(probes[rows], gallery, mate[rows], device, workspace_mb)
            report(len(probes) + block.stop, len(probes))
    return IdentificationResult(
        gallery.names, mate, mate_score, rank, ranking.identity[:, 0], ranking.score[:, 0], limit
    )

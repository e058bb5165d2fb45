"""Identification by verification: each probe is verified one to one against every identity of a gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_features, check_labels, check_threshold, check_workspace
from .cosines import unit_rows
from .gallery import Gallery
from .gallery_search import WORKSPACE_MB
from .identity_scores import probe_blocks, score_blocks
from .nearest_rows import Progress


@dataclass(frozen=True, eq=False)
class VerifiedIdentities:
    """What one-to-one verification against a whole gallery accepts: of :func:`identify_by_verification`.

    Attributes:
        threshold: scores at or above it are accepted.
        num_identities: K, the size of the gallery.
        is_mated: (P,) bool, whether each probe's identity is in the gallery.
        accepted: (P,) int64, number of identities that each probe is accepted as.
        is_mate_accepted: (P,) bool, whether its own identity is one of them.

    Raises:
        ValueError: a share of mated or of non-mated probes is read, and there is no such probe.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, identify_by_verification
        >>> gallery = enroll(np.eye(3), ["Ann", "Bob", "Eve"])
        >>> probes = np.array([[1.0, 0.1, 0.0], [0.7, 0.7, 0.0], [0.0, 1.0, 0.0], [0.4, 0.4, 0.4]])
        >>> result = identify_by_verification(probes, ["Ann", "Ann", "Eve", "Kim"], gallery, threshold=0.6)
        >>> result.accepted.tolist()
        [1, 2, 1, 0]
        >>> round(result.correct, 3), round(result.ambiguous, 3), round(result.wrong, 3), result.none
        (0.333, 0.333, 0.333, 0.0)
        >>> result.non_mated_none
        1.0
    """

    threshold: float
    num_identities: int
    is_mated: np.ndarray
    accepted: np.ndarray
    is_mate_accepted: np.ndarray

    @property
    def correct(self) -> float:
        """The share of mated probes that are accepted as exactly their identity."""
        return self._mated_share(self.is_mate_accepted & (self.accepted == 1))

    @property
    def ambiguous(self) -> float:
        """The share of mated probes that are accepted as their identity and as others."""
        return self._mated_share(self.is_mate_accepted & (self.accepted > 1))

    @property
    def wrong(self) -> float:
        """The share of mated probes that are accepted only as others."""
        return self._mated_share(~self.is_mate_accepted & (self.accepted > 0))

    @property
    def none(self) -> float:
        """The share of mated probes that are accepted as nobody."""
        return self._mated_share(self.accepted == 0)

    @property
    def non_mated_one(self) -> float:
        """The share of non-mated probes that are accepted as exactly one identity."""
        return self._non_mated_share(self.accepted == 1)

    @property
    def non_mated_several(self) -> float:
        """The share of non-mated probes that are accepted as several identities."""
        return self._non_mated_share(self.accepted > 1)

    @property
    def non_mated_none(self) -> float:
        """The share of non-mated probes that are accepted as nobody, as they should."""
        return self._non_mated_share(self.accepted == 0)

    @property
    def false_match_rate(self) -> float:
        """The share of comparisons of a probe with another identity that are accepted.

        With independent errors at this rate f, a search among K identities has a false positive with probability
        1 - (1 - f)^K (Daugman, Biometric decision landscapes, 2000).
        """
        comparisons = len(self.accepted) * self.num_identities - np.count_nonzero(self.is_mated)
        if not comparisons:
            raise ValueError("labels: expected a probe of another identity than the gallery's only one, got none")
        return float((self.accepted - self.is_mate_accepted).sum() / comparisons)

    def _mated_share(self, chosen: np.ndarray) -> float:
        if not self.is_mated.any():
            raise ValueError("labels: expected a probe of an identity in the gallery, got none; this rate is undefined")
        return float(np.mean(chosen[self.is_mated]))

    def _non_mated_share(self, chosen: np.ndarray) -> float:
        if self.is_mated.all():
            raise ValueError(
                "labels: expected a probe of an identity outside the gallery, got none; this rate is undefined"
            )
        return float(np.mean(chosen[~self.is_mated]))


def identify_by_verification(
    probes: np.ndarray,
    labels: np.ndarray | Sequence[str] | Sequence[int],
    gallery: Gallery,
    threshold: float,
    *,
    device: torch.device | str = "cpu",
    workspace_mb: float = WORKSPACE_MB,
    progress: Progress | None = None,
) -> VerifiedIdentities:
    """Identification by verification: accept every identity whose score is at or above a verification threshold.

    Unlike a search for the best candidates, each of the K comparisons is a decision of its own, so that a probe can be
    accepted as nobody, as one identity, or as several. Scores are those of :func:`search_gallery`.

    Args:
        probes: (P, D) of any norm; may be a memory map.
        labels: (P,) texts or integers, as the names of the gallery are.
        gallery: the enrolled identities.
        threshold: of the cosine, as of :func:`tar_at_far` or :func:`kfold_accuracy`.
        device: of the matrix products, which are in float64.
        workspace_mb: bound on scratch memory in MiB.
        progress: called with the number of probes that are done and the number of all, after each block of probes.

    Raises:
        ValueError: an array is empty, has a wrong shape or type or is not finite, ``threshold`` is NaN, or
            ``workspace_mb`` is not positive.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, identify_by_verification
        >>> gallery = enroll(np.eye(2), ["Ann", "Bob"])
        >>> result = identify_by_verification(np.array([[1.0, 0.2], [1.0, 1.0]]), ["Ann", "Bob"], gallery, 0.7)
        >>> result.correct, result.ambiguous
        (0.5, 0.5)
    """
    check_features("probes", probes, gallery.templates.shape[1])
    mate = gallery.index_of(check_labels("labels", labels, len(probes)))
    check_threshold(threshold)
    check_workspace(workspace_mb)
    accepted = np.zeros(len(probes), np.int64)
    is_mate_accepted = np.zeros(len(probes), bool)
    for rows in probe_blocks(len(probes), gallery, workspace_mb):
        unit = unit_rows(probes[rows])
        bound = np.full(len(unit), threshold, np.float64)
        for block in score_blocks(unit, gallery, device, workspace_mb):
            block.settle(bound)
            passes = block.scores >= threshold
            accepted[rows] += np.count_nonzero(passes, axis=1)
            column = mate[rows] - block.begin
            probe = np.flatnonzero((mate[rows] >= 0) & (column >= 0) & (column < passes.shape[1]))
            is_mate_accepted[rows.start + probe] = passes[probe, column[probe]]
        if progress is not None:
            progress(rows.stop, len(probes))
    return VerifiedIdentities(float(threshold), len(gallery.names), mate >= 0, accepted, is_mate_accepted)

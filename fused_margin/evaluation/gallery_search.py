"""Search of a gallery: the best identities of each probe, exactly, and the names that a threshold accepts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .checks import check_count, check_features, check_threshold, check_workspace
from .cosines import unit_rows
from .gallery import Gallery
from .identity_scores import best_identities, probe_blocks
from .nearest_rows import MAX_ROWS, Progress, search_rows

WORKSPACE_MB = 256.0


class Ranking(NamedTuple):
    """The best identities of each probe: the result of :func:`search_gallery`.

    Attributes:
        score: (P, k) float64 cosines, in descending order.
        identity: (P, k) int64 indices into the names of the gallery.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import Ranking
        >>> ranking = Ranking(score=np.array([[0.9, 0.4]]), identity=np.array([[1, 0]]))
        >>> np.array(["Ann", "Bob"])[ranking.identity].tolist()
        [['Bob', 'Ann']]
    """

    score: np.ndarray
    identity: np.ndarray


class Recognition(NamedTuple):
    """Names for each probe: the result of :func:`recognize`.

    Attributes:
        names: (P, k) names of the best identities.
        scores: (P, k) float64 cosines, in descending order.
        is_known: (P,) bool, whether the best score is at or above the threshold. Otherwise the probe is unknown.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import Recognition
        >>> names, scores, is_known = Recognition(np.array([["Ann"]]), np.array([[0.2]]), np.array([False]))
        >>> np.where(is_known, names[:, 0], "unknown").tolist()
        ['unknown']
    """

    names: np.ndarray
    scores: np.ndarray
    is_known: np.ndarray


def search_gallery(
    probes: np.ndarray,
    gallery: Gallery,
    k: int = 1,
    *,
    device: torch.device | str = "cpu",
    workspace_mb: float = WORKSPACE_MB,
    progress: Progress | None = None,
) -> Ranking:
    """The k best identities of each probe, exactly.

    The score of an identity is the largest cosine of its templates. An identity is in a ranking once, and of equal
    scores the identity with the lowest index is first. Scores are computed in float64. The score of a probe and an
    identity, and whether it is above another, does not depend on the other probes or the memory layout. Only if the 32
    nearest templates do not include all that are equal up to rounding (about 1e-13), which of these are found may differ.

    The nearest templates are found as by :func:`fused_margin.functional.nearest_class`, up to 32. If they have fewer than
    k identities, which needs several templates per identity or k > 32, matrix products in float64 with all templates
    find the others.

    Args:
        probes: (P, D) of any norm; may be a memory map. A zero row has cosine 0 to all others.
        gallery: the enrolled identities. Its templates may be a memory map.
        k: number of identities, 1 to the number in the gallery.
        device: of the search.
        workspace_mb: bound on scratch memory in MiB, beside int8 codes of the templates, if they are fastest on this
            processor, and a copy of the templates, if they are read-only or less precise than the probes.
        progress: called with the number of probes that are done and the number of all, after each block of probes.
            Probes that need all templates count twice.

    Raises:
        ValueError: ``probes`` is empty, not finite or has another number of columns than the templates, or ``k`` or
            ``workspace_mb`` is out of range.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, search_gallery
        >>> gallery = enroll(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), ["Ann", "Bob", "Eve"])
        >>> ranking = search_gallery(np.array([[3.0, 4.0]]), gallery, k=2)
        >>> gallery.names[ranking.identity].tolist(), ranking.score.round(6).tolist()
        ([['Bob', 'Ann']], [[0.8, 0.6]])
    """
    count = len(gallery.names)
    check_features("probes", probes, gallery.templates.shape[1])
    check_count("k", k, count, "the number of identities in the gallery")
    check_workspace(workspace_mb)
    score = np.full((len(probes), k), -np.inf)
    identity = np.zeros((len(probes), k), np.int64)
    most = int(np.diff(gallery.first_template).max())
    rows = min(MAX_ROWS, (k - 1) * most + 1, len(gallery.templates))  # as many always have k identities, but for 32
    pending = np.arange(len(probes))
    if rows >= k:
        cosine, row = search_rows(probes, gallery.templates, rows, device, workspace_mb, progress)
        for block in probe_blocks(len(probes), gallery, workspace_mb):
            score[block], identity[block] = _first_of_identities(cosine[block], gallery.identity[row[block]], k)
        pending = np.flatnonzero(np.isneginf(score[:, -1]))
    searched = len(probes) if rows >= k else 0
    for block in probe_blocks(len(pending), gallery, workspace_mb):
        selected = pending[block]
        score[selected], identity[selected] = best_identities(
            unit_rows(probes[selected]), gallery, k, device, workspace_mb
        )
        if progress is not None:
            progress(searched + block.stop, searched + len(pending))
    return Ranking(score, identity)


def _first_of_identities(cosine: np.ndarray, listed: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (P, k) and identities of the first k identities in lists; -inf where there are fewer.

    Args:
        cosine: (P, n) cosines of templates, descending.
        listed: (P, n) the identities of these templates.
    """
    order = np.argsort(listed, axis=1, kind="stable")
    grouped = np.take_along_axis(listed, order, axis=1)
    is_first = np.ones(listed.shape, bool)
    np.put_along_axis(is_first, order[:, 1:], grouped[:, 1:] != grouped[:, :-1], axis=1)
    rank = np.cumsum(is_first, axis=1) - 1
    probe, place = np.nonzero(is_first & (rank < k))
    score, identity = np.full((len(listed), k), -np.inf), np.zeros((len(listed), k), np.int64)
    score[probe, rank[probe, place]] = cosine[probe, place]
    identity[probe, rank[probe, place]] = listed[probe, place]
    return score, identity


def recognize(
    probes: np.ndarray,
    gallery: Gallery,
    threshold: float,
    k: int = 1,
    *,
    device: torch.device | str = "cpu",
    workspace_mb: float = WORKSPACE_MB,
    progress: Progress | None = None,
) -> Recognition:
    """Who is this? The names of the k best identities of each probe, and whether the best is accepted.

    Args:
        probes, gallery, k, device, workspace_mb, progress: as for :func:`search_gallery`.
        threshold: a probe is known if its best score is at or above it, as of
            :meth:`IdentificationResult.threshold_at_fpir`.

    Raises:
        ValueError: as :func:`search_gallery`, or ``threshold`` is NaN.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, recognize
        >>> gallery = enroll(np.array([[1.0, 0.0], [0.0, 1.0]]), ["Ann", "Bob"])
        >>> found = recognize(np.array([[0.1, 2.0], [-1.0, -1.0]]), gallery, threshold=0.4)
        >>> np.where(found.is_known, found.names[:, 0], "unknown").tolist()
        ['Bob', 'unknown']
    """
    check_threshold(threshold)
    ranking = search_gallery(probes, gallery, k, device=device, workspace_mb=workspace_mb, progress=progress)
    return Recognition(gallery.names[ranking.identity], ranking.score, ranking.score[:, 0] >= threshold)

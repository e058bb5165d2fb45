"""The threshold for a wanted false-positive rate, estimated from the images of the gallery itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .checks import check_features, check_labels
from .gallery import Gallery
from .gallery_search import WORKSPACE_MB, search_gallery
from .identification import IdentificationResult, ThresholdAtFpir
from .nearest_rows import Progress


def estimate_threshold(
    features: np.ndarray,
    labels: np.ndarray | Sequence[str] | Sequence[int],
    gallery: Gallery,
    fpir: float = 1e-2,
    *,
    device: torch.device | str = "cpu",
    workspace_mb: float = WORKSPACE_MB,
    progress: Progress | None = None,
) -> ThresholdAtFpir:
    """A threshold for a gallery without images of unknown identities.

    Each image takes the part of a non-mated probe: it searches the gallery without its own identity. The threshold is
    the smallest one for which at most a share ``fpir`` of the images have a score at or above it.

    The estimate holds for unknown probes whose images are like those of the gallery. If they are worse, as from another
    camera, measure :meth:`IdentificationResult.threshold_at_fpir` on such images instead. It depends on the size of the
    gallery: estimate it again after many identities were added.

    Args:
        features: (n, D) of any norm, usually the enrolled images.
        labels: (n,) texts or integers, as the names of the gallery are. An identity that is not enrolled has none to
            leave out.
        gallery: the enrolled identities.
        fpir: the wanted false-positive identification rate, from 0 to 1.
        device, workspace_mb, progress: as for :func:`search_gallery`.

    Raises:
        ValueError: as :func:`search_gallery`, ``labels`` has a wrong shape or kind, the gallery has no other identity
            than that of an image, or ``fpir`` is not a rate.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import enroll, estimate_threshold
        >>> features = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> labels = ["Ann", "Bob", "Eve"]  # their best other identities have cosines of 0.6, 0.8 and 0.8
        >>> found = estimate_threshold(features, labels, enroll(features, labels), fpir=0.7)  # just above 0.6
        >>> round(found.threshold, 6), round(found.measured, 3), found.resolved
        (0.6, 0.667, True)
    """
    check_features("features", features, gallery.templates.shape[1])
    own = gallery.index_of(check_labels("labels", labels, len(features)))
    count = len(gallery.names)
    if count == 1 and (own >= 0).any():
        raise ValueError(
            "gallery: expected two identities or more, because an image is compared with the others, got one; choose "
            "a threshold"
        )
    ranking = search_gallery(
        features, gallery, min(2, count), device=device, workspace_mb=workspace_mb, progress=progress
    )
    place = (ranking.identity[:, 0] == own).astype(np.int64)  # after its own identity
    rows = np.arange(len(features))
    none = np.full(len(features), -1)
    result = IdentificationResult(
        names=gallery.names,
        mate=none,
        mate_score=np.full(len(features), np.nan),
        rank=none + 1,
        best=ranking.identity[rows, place],
        best_score=ranking.score[rows, place],
        max_rank=1,
    )
    return result.threshold_at_fpir(fpir)

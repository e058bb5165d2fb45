"""The split of labelled images into a gallery, mated probes and non-mated probes, to measure identification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .checks import check_count, check_labels


class GallerySplit(NamedTuple):
    """Rows of images to enrol and to identify: the result of :func:`split_gallery`.

    Attributes:
        gallery: (G,) ascending rows to enrol.
        probes: (P,) ascending rows to identify, of the enrolled identities and of the unknown ones.
        is_unknown: (P,) bool, whether the identity of a probe is not enrolled.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import GallerySplit
        >>> split = GallerySplit(np.array([0]), np.array([1, 2]), np.array([False, True]))
        >>> split.probes[split.is_unknown].tolist()
        [2]
    """

    gallery: np.ndarray
    probes: np.ndarray
    is_unknown: np.ndarray


def split_gallery(
    labels: np.ndarray | Sequence[str] | Sequence[int],
    unknown: float = 0.5,
    enrolled: int | None = None,
    seed: int = 0,
) -> GallerySplit:
    """Split labelled images at random into a gallery, mated probes, and probes of identities outside the gallery.

    A share of the identities is unknown: all of their images are non-mated probes. At least one identity is unknown,
    unless the share is 0 (closed set), and at least one with two images is not. Of each other identity, some images are
    enrolled and the rest are mated probes. An identity with one image is enrolled with it, and has no probe.

    Args:
        labels: (n,) texts or integers, the identity of each image.
        unknown: share of the identities that are not enrolled, rounded down; 0 or more and below 1.
        enrolled: number of images of each identity to enrol, at most all but one; None: half of them, rounded down.
        seed: of the random choices.

    Raises:
        ValueError: none has two images, there is one identity and ``unknown`` is not 0, or an argument is out of
            range.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import split_gallery
        >>> labels = np.repeat(["Ann", "Bob", "Eve", "Kim"], 3)
        >>> gallery, probes, is_unknown = split_gallery(labels, unknown=0.25, enrolled=1, seed=0)
        >>> labels[gallery].tolist()
        ['Ann', 'Bob', 'Kim']
        >>> labels[probes[is_unknown]].tolist(), labels[probes[~is_unknown]].tolist()
        (['Eve', 'Eve', 'Eve'], ['Ann', 'Ann', 'Bob', 'Bob', 'Kim', 'Kim'])
    """
    names, identity, counts = np.unique(check_labels("labels", labels), return_inverse=True, return_counts=True)
    if not 0 <= unknown < 1:
        raise ValueError(f"unknown: expected a share from 0 to below 1, got {unknown}")
    if enrolled is not None:
        check_count("enrolled", enrolled)
    if len(names) < 2 and unknown:
        raise ValueError("labels: expected two identities or more, because some stay outside the gallery; got one")
    paired = np.flatnonzero(counts >= 2)
    if not len(paired):
        raise ValueError(
            "labels: expected an identity with two images or more, one to enrol and one to identify, got none"
        )
    rng = np.random.default_rng(seed)
    kept = rng.choice(paired)
    others = rng.permutation(np.delete(np.arange(len(names)), kept))
    num_outside = max(1, int(unknown * len(names))) if unknown else 0
    is_outside = np.isin(identity, others[:num_outside])
    wanted = counts // 2 if enrolled is None else np.minimum(enrolled, counts - 1)
    # The position of each image among those of its identity, in random order.
    order = rng.permutation(len(identity))
    order = order[np.argsort(identity[order], kind="stable")]
    position = np.empty(len(identity), np.int64)
    position[order] = np.arange(len(identity)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_enrolled = ~is_outside & (position < np.maximum(wanted, 1)[identity])
    probes = np.flatnonzero(~is_enrolled)
    return GallerySplit(np.flatnonzero(is_enrolled), probes, is_outside[probes])

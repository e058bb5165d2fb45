"""The MegaFace protocol: identification and verification of probes among distractors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_features, check_integers
from .metrics import TarAtFar, false_accepts, tar_at_far

BLOCK_SCORES = 2**24  # probe-distractor scores in memory at a time; float32 counts exactly up to this number
SCORE_BINS = 20_000  # of the histogram of distractor scores, over cosines from -1 to 1


class MegafaceResult(NamedTuple):
    """Identification and verification results of :func:`megaface`.

    Attributes:
        sizes: (num_sizes,) number of distractors in each gallery.
        rank1: (num_sizes,) share of hits among the ordered probe pairs.
        tar: the true accept rate at a false accept rate.
        genuine: (num_genuine,) cosines of all pairs of probes of one identity.
        impostor: (20,000,) cosine at the center of each bin of a histogram.
        impostor_count: (20,000,) number of probe-distractor pairs in each bin.
        nearest: (num_probes,) row of the distractor that is most similar to each probe.
        nearest_cosine: (num_probes,) cosine to it.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import megaface, summarize
        >>> result = megaface(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), np.ones((5, 2)), far=0.1)
        >>> summarize(result.genuine, result.impostor, result.tar, result.impostor_count).auc
        1.0
    """

    sizes: np.ndarray
    rank1: np.ndarray
    tar: TarAtFar
    genuine: np.ndarray
    impostor: np.ndarray
    impostor_count: np.ndarray
    nearest: np.ndarray
    nearest_cosine: np.ndarray


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
    """MegaFace: identification and verification of probes among up to a million distractors.

    See Kemelmacher-Shlizerman et al. 2016. Identification: for each ordered pair of images of one identity, the gallery
    has the second image and the distractors. The pair is a hit if the cosine of the first image to the second exceeds
    that to every distractor; a tie is a miss. Verification: genuine pairs are pairs of probes of one identity, impostor
    pairs are all pairs of a probe and a distractor.

    Distractors are processed in blocks of at most ``block_scores`` scores. Three results are accumulated: each probe's
    highest score and its distractor, the highest scores overall, which determine the TAR, and a histogram for the ROC
    curve.

    Args:
        probes: (num_probes, D), of any norm.
        identity: (num_probes,) integers.
        distractors: (num_distractors, D), of other identities than the probes; may be a memory map.
        sizes: numbers of distractors in the galleries, which take the first distractors; by default the powers of
            ten and all.
        far: false accept rate, 0 to 1.
        device: of the matrix products.
        block_scores: largest number of scores in memory at a time.

    Raises:
        ValueError: an array is empty, has a wrong shape or type or is not finite, no identity has two probes, or a
            size exceeds the number of distractors.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import megaface
        >>> probes = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8]])
        >>> identity = np.array([0, 0, 1, 1])
        >>> distractors = np.array([[0.7, 0.7], [-1.0, 0.0]])
        >>> result = megaface(probes, identity, distractors, sizes=[1, 2], far=0.25)
        >>> result.rank1.tolist()  # a miss: the last probe is nearer to the first distractor
        [0.75, 0.75]
    """
    check_features("probes", probes)
    check_integers("identity", identity, (len(probes),))
    check_features("distractors", distractors, probes.shape[1], check_values=False)  # values are checked by block
    count = len(distractors)
    if sizes is None:
        powers = [10**n for n in range(1, 1 + math.ceil(math.log10(count)))]
        sizes = [size for size in powers if size < count] + [count]
    if not len(sizes) or min(sizes) < 1 or max(sizes) > count:
        raise ValueError(f"sizes: expected galleries of 1 to {count} distractors, got {list(sizes)}")
    galleries = np.unique(sizes)
    order = np.argsort(identity, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    groups = [members for members in groups if len(members) >= 2]
    if not groups:
        raise ValueError("identity: expected an identity with at least two probes, got none")

    unit = _unit(probes, device)
    num_top = false_accepts(far, len(unit) * count) + 1  # the highest rejected score is the threshold
    top = torch.empty(0, device=device, dtype=unit.dtype)
    bins = torch.zeros(SCORE_BINS, dtype=torch.float64, device=device)
    best = torch.full((len(unit),), -torch.inf, device=device, dtype=unit.dtype)
    nearest = torch.zeros(len(unit), device=device, dtype=torch.int64)
    best_among = []  # of each size, (num_probes,)
    edges = sorted({*range(0, count, max(1, block_scores // len(unit))), *galleries.tolist(), count})
    for start, stop in pairwise(edges):
        block = distractors[start:stop]
        check_features("distractors", block)
        scores = unit @ _unit(block, device).to(unit.dtype).T
        block_best, row = scores.max(dim=1)
        nearest = torch.where(block_best > best, start + row, nearest)
        best = torch.maximum(best, block_best)
        if stop in galleries:
            best_among.append(best)
        bins += torch.histc(scores.clamp(-1, 1), SCORE_BINS, -1, 1)
        flat = scores.flatten()
        top = torch.cat([top, flat if len(top) < num_top else flat[flat > top.min()]])
        if len(top) > num_top:
            top = top.topk(num_top).values

    hits, genuine_parts = np.zeros(len(galleries)), []
    for members in groups:
        cosine = unit[members] @ unit[members].T
        others = ~torch.eye(len(members), dtype=torch.bool, device=device)
        hits += [float(((cosine > limit[members, None]) & others).sum()) for limit in best_among]
        genuine_parts.append(cosine[others.triu()].cpu().numpy())
    genuine = np.concatenate(genuine_parts)
    middle = (np.arange(SCORE_BINS) + 0.5) * (2 / SCORE_BINS) - 1
    tar = tar_at_far(genuine, top.cpu().numpy(), far, len(unit) * count)
    return MegafaceResult(
        galleries,
        hits / (2 * len(genuine)),
        tar,
        genuine,
        middle,
        bins.cpu().numpy(),
        nearest.cpu().numpy(),
        best.cpu().numpy(),
    )


def _unit(features: np.ndarray, device: torch.device | str) -> Tensor:
    """Normalized rows, in float64 if the input is, otherwise in float32."""
    kind = np.float64 if features.dtype == np.float64 else np.float32
    return F.normalize(torch.from_numpy(np.array(features, kind)).to(device))

"""Losses over triplets of samples, without class weights, in memory O(N^2): triplet loss and angular triplet loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.sample_pairs import DISTANCES, SamplePairs
from fused_margin.losses import settings
from fused_margin.losses.pairs import SamplePairLoss

MINING = ("batch-hard", "nearest-semihard", "semihard", "hard", "all")


class TripletLoss(SamplePairLoss):
    r"""Triplet loss: an anchor is nearer to a sample of its class than to one of another class, by a margin.

    For an anchor a, a positive p of its class and a negative n of another class, with the distance d::

        loss = max(0, d(a, p) - d(a, n) + margin)

    FaceNet (arXiv:1503.03832, eq. 1 to 3) has squared distances of unit-length embeddings and a margin of 0.2. ``mining``
    selects the triplets of the batch:

    - "batch-hard": for each anchor, the farthest positive and the nearest negative (Hermans, Beyer and Leibe,
      arXiv:1703.07737, eq. 5). The mean is over the anchors that have both.
    - "nearest-semihard": for each anchor and positive, the nearest of the semi-hard negatives, if there is one (FaceNet,
      section 3.2). Semi-hard: farther than the positive, but within the margin.
    - "semihard": all triplets with a semi-hard negative.
    - "hard": all triplets whose negative is no farther than the positive.
    - "all": all triplets (Hermans et al., eq. 6).

    All but "batch-hard" average over their triplets with a loss above 0. "semihard", "hard" and "all" are
    pytorch-metric-learning's ``TripletMarginMiner`` and ``TripletMarginLoss`` with their defaults, whose memory is
    O(N^3). Here memory is O(N^2 + N D) and time O(N^2 log N + N^2 D): for each anchor, the negatives are sorted, and
    the loss is linear in the distances with coefficients that count triplets.

    The gradient is exact, with fixed triplets. Where the distance has no derivative, it is 0: for "euclidean" at a
    distance of 0, and for "angle" at 0 and pi.

    Args:
        margin: in units of ``distance``.
        mining: as above.
        distance: "squared", "euclidean", or "angle" in radians.
        normalize: whether embeddings are scaled to unit length. "angle" needs it.
        reduction: "mean", "sum" over triplets, or "none": for each anchor, the sum over its triplets.
        ignore_index: label of samples that take part in no triplet.
        process_group: as in :class:`ContrastiveLoss`: the triplets are of the samples of all its ranks.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``; float64 if ``embeddings``
        is, else float32. Any integer is a label. 0, with a gradient of 0, for a batch without triplets.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]])
        >>> labels = torch.tensor([0, 0, 1])  # squared distances: 2 within class 0; 3.2 and 0.4 to class 1
        >>> triplet_loss = fused_margin.TripletLoss(reduction="none")
        >>> [round(value, 4) for value in triplet_loss(embeddings, labels).tolist()]  # 2 - 0.4 + 0.2 for the second
        [0.0, 1.8, 0.0]
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.number(0.0),
        "mining": settings.one_of(*MINING),
        "distance": settings.one_of(*DISTANCES),
    }
    margin: float
    mining: str
    distance: str

    def __init__(
        self,
        margin: float = 0.2,
        *,
        mining: str = "batch-hard",
        distance: str = "squared",
        normalize: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(normalize, reduction, ignore_index, process_group)
        self.margin, self.mining, self.distance = margin, mining, distance

    def check_together(self, values: dict[str, Any]) -> None:
        if values.get("distance") == "angle" and not values.get("normalize", True):
            raise ValueError("normalize: expected True with distance='angle', got False")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,)."""
        pairs = self.pairs(embeddings, labels, self.distance)
        if not len(pairs.labels):  # torch has no maximum of nothing
            sums, count = pairs.distance.sum(1), pairs.genuine.sum()
        elif self.mining == "batch-hard":
            sums, count = hardest_triplets(pairs, self.margin)
        else:
            sums, count = mined_triplets(pairs, self.margin, self.mining)
        return self.reduce_sums(pairs, [sums], [count], compute_dtype(embeddings))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining!r}, distance={self.distance!r}, normalize={self.normalize}"


class AngularTripletLoss(TripletLoss):
    """Triplet loss on angles: an anchor's angle to a negative is larger than that to a positive, by a margin.

    ``max(0, arccos(x_a . x_p) + margin - arccos(x_a . x_n))`` with unit-length embeddings. This is the constraint
    ``arccos(x_a . x_p) + m <= arccos(x_a . x_n)``, m = 0.35, of ArcFace's comparison with triplet loss
    (arXiv:1801.07698). It is :class:`TripletLoss` with ``distance="angle"``. Angles are accurate near 0 and pi, where
    arccos is not, and their gradient is bounded.

    Args:
        margin: in radians. A value above pi triggers a warning.
        mining, reduction, ignore_index, process_group: as in :class:`TripletLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``; float64 if ``embeddings``
        is, else float32. 0, with a gradient of 0, for a batch without triplets.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import math, torch, fused_margin
        >>> degrees = [0, 90, 60]
        >>> embeddings = torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])
        >>> angular_triplet_loss = fused_margin.AngularTripletLoss(reduction="none")
        >>> loss = angular_triplet_loss(embeddings, torch.tensor([0, 0, 1]))
        >>> [round(value, 4) for value in loss.tolist()]  # of the first, 90 - 60 degrees, + 0.35
        [0.8736, 1.3972, 0.0]
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.angle(0.0),
        "distance": settings.one_of("angle"),
    }

    def __init__(
        self,
        margin: float = 0.35,
        *,
        mining: str = "batch-hard",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(
            margin,
            mining=mining,
            distance="angle",
            reduction=reduction,
            ignore_index=ignore_index,
            process_group=process_group,
        )


def hardest_triplets(pairs: SamplePairs, margin: float) -> tuple[Tensor, Tensor]:
    """The loss (N,) of each anchor with its farthest positive and nearest negative, and the number of such anchors."""
    used = pairs.genuine.any(1) & pairs.impostor.any(1)
    farthest = pairs.distance.masked_fill(~pairs.genuine, -math.inf).max(1).values
    nearest = pairs.distance.masked_fill(~pairs.impostor, math.inf).min(1).values
    return (farthest - nearest + margin).relu().masked_fill(~used, 0.0), used.sum()


def mined_triplets(pairs: SamplePairs, margin: float, mining: str) -> tuple[Tensor, Tensor]:
    """The sum (N,) of the losses of each anchor's mined triplets, and the number of triplets with a loss above 0."""
    coefficient, per_anchor = triplet_counts(pairs, margin, mining)
    # The loss is piecewise linear in the distances, so the coefficients give its value and its gradient.
    return (coefficient * pairs.distance).sum(1) + margin * per_anchor, per_anchor.sum()


@torch.no_grad()
def triplet_counts(pairs: SamplePairs, margin: float, mining: str) -> tuple[Tensor, Tensor]:
    """Coefficients (N, M) of the distances in the sum of the losses, and the number of triplets (N,) of each anchor.

    The coefficient of a positive is the number of its triplets with a loss above 0, that of a negative is minus it. With
    the negatives of an anchor in ascending order, those of a positive at distance d are neighbours.
    """
    related = pairs.genuine | pairs.impostor
    broken = pairs.distance.isnan() & related
    distance = pairs.distance.masked_fill(broken, math.inf)
    negatives, order = distance.masked_fill(~pairs.impostor, math.inf).sort(dim=1)
    within = torch.searchsorted(negatives, distance + margin)  # number of negatives below d + margin
    nearer = torch.searchsorted(negatives, distance, right=True)  # number of negatives up to d
    nearer = nearer.minimum(within)
    begin, end = {
        "all": (torch.zeros_like(within), within),
        "hard": (torch.zeros_like(within), nearer),
        "semihard": (nearer, within),
        "nearest-semihard": (nearer, (nearer + 1).minimum(within)),
    }[mining]
    positive_count = (end - begin).masked_fill(~pairs.genuine, 0)
    # +1 where the negatives of a positive begin and -1 behind them; running sums count the positives of each negative.
    step = pairs.genuine.to(torch.int64)
    changes = step.new_zeros(step.shape[0], step.shape[1] + 1)
    changes = changes.scatter_add_(1, begin, step).scatter_add_(1, end, -step)
    negative_count = torch.zeros_like(step).scatter_(1, order, changes.cumsum(1)[:, :-1])
    coefficient = (positive_count - negative_count).to(pairs.distance.dtype)
    return coefficient.masked_fill(broken, 1.0), positive_count.sum(1).to(coefficient.dtype)  # 1: NaN spreads

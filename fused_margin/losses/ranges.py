"""Auxiliary losses over pairs of the samples of a batch: range loss and marginal loss."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.normalization import unit_rows
from fused_margin.losses import settings
from fused_margin.losses.gathered import GatheredLoss

# A squared distance below it counts as 0. Its inverse and the square of the inverse are finite in float64.
SMALLEST_SQUARE = 1e-150


class RangeLoss(GatheredLoss):
    """Range loss: the largest distances within classes, and the smallest distance between class means.

    For every class of the batch, the harmonic mean of its k largest squared distances; for the whole batch, a hinge on the
    smallest squared distance of two class means (Zhang, Fang, Wen, Li and Qiao, ICCV 2017, arXiv:1611.08976)::

        loss  = alpha * sum_c k / sum_{r=1}^k (1 / D_r)  +  beta * max(0, margin - |m_p - m_q|^2)

    D_r is the r-th largest ``|x_i - x_j|^2`` of two samples of class c. m_p and m_q are the means of the embeddings of the
    two classes whose means are nearest. Embeddings are not normalized. The paper sums over
    classes; the default here is the mean over the classes that have a range. A class with fewer than k pairs uses all of
    its pairs. A class of one sample has no range, but its mean counts. A class with a distance of 0 among its k largest
    has a harmonic mean of 0, with a gradient of 0.

    Args:
        k: number of distances per class. The paper recommends 2.
        margin: squared distance of class means beyond which they are not pushed apart.
        alpha: weight of the ranges.
        beta: weight of the distance between class means. The defaults of ``margin``, ``alpha`` and ``beta`` are those of
            a published implementation, for embeddings of any length.
        reduction: ``"mean"`` or ``"sum"`` over classes.
        ignore_index: label of samples without a class.
        process_group: a torch.distributed group. The batch is then that of all its ranks, and every rank returns the loss
            of that batch. Ranks may have different numbers of samples.

    Shape:
        embeddings (N, D), labels (N,) any integers -> scalar; float64 if ``embeddings`` is, else float32. 0 if no two
        samples have the same class and no two have different ones. Memory is O(N^2 + N k D).

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> range_loss = fused_margin.RangeLoss(k=2, margin=20.0, alpha=1.0, beta=1.0)
        >>> embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [4.0, 4.0]])
        >>> labels = torch.tensor([0, 0, 0, 1])  # squared distances 9, 4 and 1; means (4 / 3, 0) and (4, 4)
        >>> round(range_loss(embeddings, labels).item(), 3)  # 2 / (1 / 9 + 1 / 4) + 0
        5.538
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "k": _checks.positive_index,
        "margin": settings.number(0.0),
        "alpha": settings.number(0.0),
        "beta": settings.number(0.0),
        "reduction": settings.one_of("mean", "sum"),
    }
    k: int
    margin: float
    alpha: float
    beta: float

    def __init__(
        self,
        k: int = 2,
        margin: float = 2e4,
        alpha: float = 1e-4,
        beta: float = 1e-3,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(reduction, ignore_index, process_group)
        self.k, self.margin, self.alpha, self.beta = k, margin, alpha, beta

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,)."""
        samples = self.gather(embeddings, labels)
        rows = samples.embeddings.double()
        if not len(rows):
            return rows.sum().to(samples.embeddings.dtype)
        same = samples.of_one_class()
        # A class is identified by its first sample, and computed by the rank that has this sample.
        first = same.to(torch.uint8).argmax(1)
        is_own = torch.zeros_like(samples.valid)
        is_own[samples.own] = True
        ranges, has_range = self.ranges(rows, same, first)
        intra = ranges.masked_fill(~(has_range & is_own), 0.0).sum()
        if self.reduction == "mean":
            intra = intra / has_range.sum().clamp(min=1)
        inter, nearest = self.nearest_means(rows, same, first)
        total = self.alpha * intra + self.beta * inter.where(is_own[nearest][0], 0.0)
        return self.over_ranks(total).to(samples.embeddings.dtype)

    def ranges(self, rows: Tensor, same: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The harmonic mean of the largest squared distances of a class, at its first sample, and whether it has any."""
        pair = largest_pairs(rows, same, first, self.k)
        # An entry that is no pair has a difference of 0, so that NaN in it reaches no gradient.
        difference = (rows[pair.one] - rows[pair.other]).masked_fill(~pair.exists.unsqueeze(1), 0.0)
        distance = difference.square().sum(1)
        is_zero = distance <= SMALLEST_SQUARE
        inverse = 1.0 / distance.masked_fill(is_zero, 1.0)
        inverse = inverse.masked_fill(is_zero | ~pair.exists, 0.0)

        def per_class(values: Tensor) -> Tensor:  # index_put in float64 adds in a fixed order on every device
            return torch.zeros_like(rows[:, 0]).index_put((pair.of_class,), values, accumulate=True)

        count, zeros = per_class(pair.exists.double()), per_class((is_zero & pair.exists).double())
        total = per_class(inverse)
        total = total.masked_fill(total == 0, 1.0)
        return (count / total).masked_fill(zeros > 0, 0.0), count > 0

    def nearest_means(self, rows: Tensor, same: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """The hinge on the distance of the nearest class means, and the first samples (2,) of these classes."""
        weights = same.double() / same.sum(1, keepdim=True).clamp(min=1)  # of the samples in the mean of their class
        with torch.no_grad():
            position = torch.arange(len(rows), device=rows.device)
            is_first = same.diagonal() & (first == position)
            is_pair = (is_first.unsqueeze(1) & is_first).triu(1)
            means = weights @ rows
            distance = squared_distances(means, means).masked_fill(~is_pair, torch.inf)
            nearest = distance.flatten().argmin()  # NaN is the smallest
            at = torch.stack([nearest // len(rows), nearest % len(rows)])
        one, other = (weights[at] @ rows).unbind()
        hinge = F.relu(self.margin - (one - other).square().sum())
        return hinge.where(is_pair.any(), 0.0), at

    def extra_repr(self) -> str:
        return f"k={self.k}, margin={self.margin}, alpha={self.alpha}, beta={self.beta}"


class Pairs(NamedTuple):
    """Some pairs of samples of one class, as positions (P,) int64."""

    one: Tensor
    other: Tensor
    of_class: Tensor  # the first sample of their class
    exists: Tensor  # (P,) bool; an entry that is False is no pair


@torch.no_grad()
def largest_pairs(rows: Tensor, same: Tensor, first: Tensor, k: int) -> Pairs:
    """The k pairs of every class with the largest distances, or all pairs of a class that has fewer.

    They are among the k largest of each sample. So there are N * k candidates, which are sorted by class and distance.
    """
    samples = len(rows)
    distance = squared_distances(rows, rows).clamp_(min=0.0).masked_fill_(~same.triu(1), -1.0)
    distance, other = (values.flatten() for values in distance.topk(min(k, samples), dim=1))
    one = torch.arange(samples, device=rows.device).repeat_interleave(min(k, samples))
    order = distance.argsort(descending=True, stable=True)
    order = order[first[one[order]].argsort(stable=True)]
    one, other, distance = one[order], other[order], distance[order]
    of_class = first[one]
    rank = torch.arange(len(one), device=rows.device) - torch.searchsorted(of_class, of_class)
    return Pairs(one, other, of_class, (rank < k) & (distance != -1.0))


def squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Squared distances (N, M) of float64 rows (N, D) and (M, D). Rounding may make them slightly negative.

    They are computed from inner products, in float64: autocast would round float32 to half precision.
    """
    squares = rows.square().sum(1, keepdim=True) + others.square().sum(1)
    return squares.addmm(rows, others.t(), alpha=-2.0)


class MarginalLoss(GatheredLoss):
    """Marginal loss: a hinge on the distance of every pair of samples, on one side of a threshold or the other.

    The mean over all ordered pairs of different samples, with unit-length embeddings u (Deng, Zhou and Zafeiriou, CVPR
    workshops 2017, eq. 4)::

        loss = 1 / (N (N - 1)) * sum_i sum_{j != i} max(0, xi - y_ij * (theta - |u_i - u_j|^2))

    y_ij is 1 for samples of one class and -1 for others. So squared distances within a class are lowered to theta - xi, and
    those between classes are raised to theta + xi. The paper adds this loss to softmax with a weight lambda of 1 (eq. 5).

    Args:
        theta: threshold on the squared distance, which is at most 4.
        xi: error margin on both sides of the threshold.
        reduction: as in ``torch.nn.CrossEntropyLoss``, of the losses of the samples: the mean over a sample's pairs. The
            mean over samples is the paper's mean over pairs.
        ignore_index: label of samples without a class. They are in no pair.
        process_group: a torch.distributed group. A sample then has pairs with the samples of all its ranks, and the
            reduction is over all ranks. Ranks may have different numbers of samples.

    Shape:
        embeddings (N, D), labels (N,) any integers -> scalar, or (N,) with ``reduction="none"``; float64 if ``embeddings``
        is, else float32. 0 if there is no pair. Memory is O(N^2), with a process group O(N M) for M samples of all ranks.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> embeddings = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # a squared distance of 2 after normalization
        >>> round(fused_margin.MarginalLoss()(embeddings, torch.tensor([5, 5])).item(), 4)  # 0.3 - (1.2 - 2)
        1.1
        >>> fused_margin.MarginalLoss()(embeddings, torch.tensor([5, 6])).item()  # max(0, 0.3 + (1.2 - 2))
        0.0
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"theta": settings.number(0.0), "xi": settings.number(0.0)}
    theta: float
    xi: float

    def __init__(
        self,
        theta: float = 1.2,
        xi: float = 0.3,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(reduction, ignore_index, process_group)
        self.theta, self.xi = theta, xi

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,)."""
        samples = self.gather(embeddings, labels)
        dtype, valid, own = samples.embeddings.dtype, samples.valid, samples.own
        unit = unit_rows(samples.embeddings, torch.float64)[0]
        distance = squared_distances(unit[own], unit)
        is_same = labels.to(torch.int64).unsqueeze(1) == samples.labels
        hinge = F.relu(self.xi + torch.where(is_same, distance - self.theta, self.theta - distance))
        position = torch.arange(len(unit), device=unit.device)
        is_pair = valid[own].unsqueeze(1) & valid & (position[own].unsqueeze(1) != position)
        count = valid.sum()
        losses = hinge.masked_fill(~is_pair, 0.0).sum(1) / (count - 1).clamp(min=1)
        if self.reduction == "none":
            return losses.to(dtype)
        total = self.over_ranks(losses.sum())
        return (total / count.clamp(min=1) if self.reduction == "mean" else total).to(dtype)

    def extra_repr(self) -> str:
        return f"theta={self.theta}, xi={self.xi}"

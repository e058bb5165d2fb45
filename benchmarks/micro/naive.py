"""The losses of the library in plain PyTorch, written from their formulas with whole matrices, as a user would write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = 64.0
Target = Callable[[Tensor], Tensor]  # target cosines (N,), to those with the margin


def cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.normalize(embeddings), F.normalize(weight))


def own(matrix: Tensor, labels: Tensor) -> Tensor:
    """The entries of an (N, C) matrix at the labels, (N,)."""
    return matrix.gather(1, labels[:, None])[:, 0]


def replace(matrix: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    return matrix.scatter(1, labels[:, None], values[:, None].to(matrix.dtype))


def angle(cosine: Tensor) -> Tensor:
    return cosine.clamp(-1, 1).acos()


def multiple_angle(cosine: Tensor, margin: float) -> Tensor:
    """SphereFace's continuation of cos(margin * theta) beyond pi, which decreases everywhere."""
    theta = margin * angle(cosine)
    k = (theta.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * theta.cos() - 2 * k


def margin_loss(margin: Target | None = None, scale: float | None = SCALE, sub_centers: int = 1):
    """The cross-entropy of scaled cosines. Without a scale, the norm of each embedding is the scale."""

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        cosine = cosines(embeddings, weight)
        if sub_centers > 1:
            cosine = cosine.unflatten(1, (-1, sub_centers)).amax(dim=2)
        if margin is not None:
            cosine = replace(cosine, labels, margin(own(cosine, labels)))
        return F.cross_entropy((embeddings.norm(dim=1, keepdim=True) if scale is None else scale) * cosine, labels)

    return loss


arcface = margin_loss(lambda cosine: (angle(cosine) + 0.5).cos())
cosface = margin_loss(lambda cosine: cosine - 0.35)
normface = margin_loss()
am_softmax = margin_loss(lambda cosine: cosine - 0.35, scale=30.0)
coco = margin_loss(scale=16.0)
vmf = margin_loss(scale=16.0)
modified_softmax = margin_loss(scale=None)
sphereface = margin_loss(lambda cosine: multiple_angle(cosine, 4), scale=None)
combined = margin_loss(lambda cosine: (angle(cosine) + 0.3).cos() - 0.2)
general = margin_loss(lambda cosine: (0.9 * angle(cosine) + 0.4).cos() - 0.15)
subcenter_arcface = margin_loss(lambda cosine: (angle(cosine) + 0.5).cos(), sub_centers=3)


def elasticface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    drawn = 0.5 + 0.05 * torch.randn(len(labels), dtype=torch.float64, device=labels.device)
    return margin_loss(lambda cosine: (angle(cosine) + drawn).cos())(embeddings, weight, labels)


def magface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    norm = embeddings.norm(dim=1).clamp(10, 110)
    margin = 0.45 + (0.8 - 0.45) * (norm - 10) / 100
    regularizer = (1 / norm + norm / 110**2).mean()
    return margin_loss(lambda cosine: (angle(cosine) + margin).cos())(embeddings, weight, labels) + 35 * regularizer


class AdaFace:
    """The running statistics of the norm are the state of the loss."""

    def __init__(self) -> None:
        self.mean, self.std = 20.0, 100.0

    def __call__(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            norm = embeddings.norm(dim=1).clamp(0.001, 100)
            self.mean = 0.99 * self.mean + 0.01 * norm.mean()
            self.std = 0.99 * self.std + 0.01 * norm.std()
            z = ((norm - self.mean) / (self.std + 1e-3) * 0.333).clamp(-1, 1)

        def margin(cosine: Tensor) -> Tensor:
            return (angle(cosine) - 0.4 * z).clamp(0, math.pi).cos() - (0.4 + 0.4 * z)

        return margin_loss(margin)(embeddings, weight, labels)


class CurricularFace:
    """The running mean t of the target cosines is the state of the loss."""

    def __init__(self) -> None:
        self.t = 0.0

    def __call__(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        cosine = cosines(embeddings, weight)
        target = own(cosine, labels)
        with_margin = (angle(target) + 0.5).cos()
        self.t = 0.99 * self.t + 0.01 * target.detach().mean()
        hard = cosine > with_margin.detach()[:, None]
        cosine = torch.where(hard, cosine * (self.t + cosine), cosine)
        return F.cross_entropy(SCALE * replace(cosine, labels, with_margin), labels)


def softmax(embeddings: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(embeddings, weight, bias), labels)


def l2_softmax(embeddings: Tensor, weight: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(16 * F.normalize(embeddings), weight, bias), labels)


def l_softmax(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(embeddings, weight)
    lengths = embeddings.norm(dim=1) * weight.norm(dim=1)[labels]
    target = lengths * multiple_angle(own(logits, labels) / lengths, 4)
    return F.cross_entropy(replace(logits, labels, target), labels)


class Center:
    """The centers are the state of the loss."""

    def __init__(self, centers: Tensor):
        self.centers = centers

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        difference = self.centers[labels] - embeddings
        self.move(difference, labels)
        return difference.square().sum(dim=1).mean() / 2

    @torch.no_grad()
    def move(self, difference: Tensor, labels: Tensor) -> None:
        total = torch.zeros_like(self.centers).index_add_(0, labels, difference)
        count = torch.bincount(labels, minlength=len(self.centers))
        self.centers -= 0.5 * total / (1 + count[:, None])


class CenterInvariant(Center):
    """Center loss with a weight of 0.1, and the norms of the centers."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        squares = self.centers.square().sum(dim=1)
        deviation = squares[labels] - squares.mean()
        # A sample moves the mean of its class, and with it the mean of all classes.
        follow = (self.centers[labels] * (embeddings - embeddings.detach())).sum(dim=1)
        surrogate = deviation * (1 - 1 / len(self.centers)) * follow
        invariant = deviation.square() / 4 + surrogate - surrogate.detach()
        return invariant.mean() + 0.1 * super().__call__(embeddings, labels)


def ring(embeddings: Tensor, radius: Tensor) -> Tensor:
    return (embeddings.norm(dim=1) - radius).square().mean() / 2


def intra(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return angle((F.normalize(embeddings) * F.normalize(weight)[labels]).sum(dim=1)).mean() / math.pi


def inter(weight: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(weight)
    cosine = replace(unit[labels] @ unit.t(), labels, torch.zeros_like(labels))  # arccos has no derivative at 1
    others = (angle(cosine).sum(dim=1) - math.pi / 2) / (len(weight) - 1)
    return -others.mean() / math.pi


def uniform(weight: Tensor) -> Tensor:
    unit = F.normalize(weight)
    potentials = 1 / (1 + torch.cdist(unit, unit))
    return potentials.fill_diagonal_(0).sum() / (len(weight) * (len(weight) - 1))


def range_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    ranges, means = [], []
    for label in labels.unique():
        rows = embeddings[labels == label]
        means.append(rows.mean(dim=0))
        if len(rows) > 1:
            largest = F.pdist(rows).square().sort(descending=True).values[:2]
            ranges.append(len(largest) / largest.reciprocal().sum())
    intra = torch.stack(ranges).mean() if ranges else embeddings.new_zeros(())
    return 1e-4 * intra + 1e-3 * F.relu(2e4 - F.pdist(torch.stack(means)).min().square())


def marginal(embeddings: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    distance = (unit[:, None] - unit).square().sum(dim=2)
    sign = torch.where(labels[:, None] == labels, 1.0, -1.0)
    hinge = F.relu(0.3 - sign * (1.2 - distance))
    return (hinge.sum() - hinge.diagonal().sum()) / (len(labels) * (len(labels) - 1))


def squared_distances(rows: Tensor) -> Tensor:
    return (rows[:, None] - rows).square().sum(dim=2)


def hardest_triplets(distance: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The mean over anchors that have a positive and a negative."""
    same = labels[:, None] == labels
    positive = distance.masked_fill(~same, -math.inf).fill_diagonal_(-math.inf).amax(dim=1)
    negative = distance.masked_fill(same, math.inf).amin(dim=1)
    used = positive.isfinite() & negative.isfinite()
    return (positive - negative + margin)[used].relu().mean()


def triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    return hardest_triplets(squared_distances(F.normalize(embeddings)), labels, 0.2)


def angular_triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    cosine = (unit @ unit.t()).fill_diagonal_(0)  # arccos has no derivative at 1
    return hardest_triplets(angle(cosine), labels, 0.35)


def contrastive_of(distance: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The mean over the pairs (P,) of a batch."""
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    return torch.where(labels[first] == labels[second], distance, (margin - distance).relu()).square().mean() / 2


def contrastive(embeddings: Tensor, labels: Tensor) -> Tensor:
    return contrastive_of(F.pdist(F.normalize(embeddings)), labels, 1.0)


def deepid2(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Before the first update of the margin."""
    return contrastive_of(F.pdist(embeddings), labels, 20.0)


class SelfGrouping:
    """The probabilities of recent samples are the state of the loss."""

    def __init__(self) -> None:
        self.recent: list[Tensor] = []

    def __call__(self, group_logits: Tensor) -> Tensor:
        probability = group_logits.detach().softmax(dim=1)
        self.recent = [*self.recent, probability][-128:]
        return F.cross_entropy(group_logits, (probability - torch.cat(self.recent).mean(dim=0)).argmax(dim=1))


def group_face(features: Tensor, *parameters: Tensor) -> Tensor:
    """The mean square of the embeddings, with a linear layer for each group."""
    instance_weight, instance_bias, weights, biases, *decision = parameters
    instance = F.linear(features, instance_weight, instance_bias)
    hidden = instance
    for weight, bias, slope in (decision[:3], decision[3:6]):
        hidden = F.prelu(F.linear(hidden, weight, bias), slope)
    probability = F.linear(hidden, *decision[6:]).softmax(dim=1)
    size = len(instance_weight)
    groups = [F.linear(features, w, b) for w, b in zip(weights.split(size), biases.split(size), strict=True)]
    return (instance + sum(p[:, None] * g for p, g in zip(probability.t(), groups, strict=True))).square().mean()


def siamese_l1(embeddings: Tensor, labels: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    unit = F.normalize(embeddings)
    odds = bias - (unit[:, None] - unit).abs() @ alpha
    same = labels[:, None] == labels
    losses = F.binary_cross_entropy_with_logits(odds, same.to(odds.dtype), reduction="none")
    other = torch.ones_like(same).triu(1)
    kinds = [losses[other & same], losses[other & ~same]]
    return sum((kind.mean() / 2 for kind in kinds if len(kind)), torch.zeros(()))


def exclusive(weight: Tensor) -> Tensor:
    return nearest_class(weight)[0].mean()


def nearest_class(weight: Tensor) -> tuple[Tensor, Tensor]:
    unit = F.normalize(weight)
    return (unit @ unit.t()).fill_diagonal_(-math.inf).max(dim=1)


def cosine_logsumexp(embeddings: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    cosine = cosines(embeddings, weight)
    return (SCALE * cosine).scatter(1, labels[:, None], -math.inf).logsumexp(dim=1), own(cosine, labels)


def project_(weight: Tensor) -> None:
    weight /= weight.norm(dim=1, keepdim=True)

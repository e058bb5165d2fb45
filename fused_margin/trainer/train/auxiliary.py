"""Auxiliary losses that the criterion adds to the main loss, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn

import fused_margin as fm
from fused_margin.losses.auxiliary_base import AuxiliaryLoss

# Arguments of each auxiliary loss. Its weight in AuxiliaryConfig has the same name.
ARGUMENTS = {
    "center": ("embeddings", "labels"),
    "ring": ("embeddings", "labels"),
    "intra": ("embeddings", "class_weight", "labels"),
    "inter": ("class_weight", "labels"),
    "uniform": ("class_weight",),
    "range": ("embeddings", "labels"),
    "marginal": ("embeddings", "labels"),
    "center_invariant": ("embeddings", "labels"),
    "triplet": ("embeddings", "labels"),
    "angular_triplet": ("embeddings", "labels"),
    "contrastive": ("embeddings", "labels"),
    "deepid2": ("embeddings", "labels"),
    "siamese": ("embeddings", "labels"),
}
# Those that compare the samples of a batch with each other, and so need several of a class in it.
BETWEEN_SAMPLES = frozenset({"range", "marginal", "triplet", "angular_triplet", "contrastive", "deepid2", "siamese"})
# Settings of the range and marginal loss: finite numbers that are not negative.
PAIR_SETTINGS = ("range_margin", "range_alpha", "range_beta", "marginal_theta", "marginal_xi")


# These options are called `companions` on the command line, in files and in the names of a checkpoint's tensors.
@dataclass(frozen=True)
class AuxiliaryConfig:
    """Auxiliary losses, added to the main loss with these weights. 0 disables a loss."""

    center: float = 0.0
    """Weight of center loss, which pulls embeddings to the moving center of their class. Paper: 0.003, with softmax."""
    ring: float = 0.0
    """Weight of ring loss, which pulls the norms of the embeddings to a learned radius. Paper: 0.01."""
    intra: float = 0.0
    """Weight of intra-loss, the angle between embeddings and their class weights. ArcFace's paper: 1."""
    inter: float = 0.0
    """Weight of inter-loss, which increases the angles from the class weights of the batch to all others.
    ArcFace's paper: 1."""
    uniform: float = 0.0
    """Weight of uniform loss, which pushes all class weights apart."""
    range: float = 0.0
    """Weight of range loss, on the largest distances within a class and the smallest distance between class means.
    It needs several images of an identity in a batch.
    The loss is large while class means are nearer than range-margin: up to range-beta times range-margin."""
    marginal: float = 0.0
    """Weight of marginal loss, on the distances of all pairs of unit-length embeddings of the batch.
    Paper: 1, with softmax."""
    center_invariant: float = 0.0
    """Weight of center-invariant loss, which pulls the norms of the class centers to their mean.
    Published example: 0.00001. The paper adds center loss too."""
    triplet: float = 0.0
    """Weight of triplet loss on the squared distances of unit-length embeddings (FaceNet)."""
    angular_triplet: float = 0.0
    """Weight of triplet loss on angles (ArcFace's comparison)."""
    contrastive: float = 0.0
    """Weight of contrastive loss on the distances of embeddings."""
    deepid2: float = 0.0
    """Weight of DeepID2's verification loss, whose margin is the threshold of recent pairs. Paper: 0.05, with softmax."""
    siamese: float = 0.0
    """Weight of DeepFace's siamese loss, the cross-entropy of same or different identity by a learned L1 distance."""
    triplet_margin: float = 0.2
    """Margin of the triplet loss, between an anchor's squared distances to the negative and to the positive."""
    angular_triplet_margin: float = 0.35
    """Margin of the angular triplet loss, in radians."""
    triplet_mining: Literal["all", "hard", "semihard", "nearest-semihard", "batch-hard"] = "semihard"
    """Which of the triplets that violate the margin are used, by both triplet losses.
    all: every triplet.
    hard: negative closer than the positive.
    semihard: negative farther than the positive.
    nearest-semihard: the nearest of these, for each anchor and positive.
    batch-hard: the farthest positive and the nearest negative, for each anchor."""
    contrastive_margins: tuple[float, float] = (0.0, 1.0)
    """Margins p and n of the contrastive loss, in the unit of --loss.companions.contrastive-form.
    Genuine pairs nearer than p and impostor pairs farther than n have no loss."""
    contrastive_form: Literal["hadsell", "squared-distance", "double-margin"] = "hadsell"
    """Form of the contrastive loss, with the distance D and its margins p and n.
    hadsell: max(0, D - p)^2 / 2 and max(0, n - D)^2 / 2.
    squared-distance: max(0, D^2 - p) / 2 and max(0, n - D^2) / 2.
    double-margin: max(0, D - p) and max(0, n - D)."""
    contrastive_normalize: bool = True
    """Whether the contrastive loss scales embeddings to unit length."""
    range_k: int = 2
    """Number of largest distances within a class that the range loss uses."""
    range_margin: float = 2e4
    """Squared distance of class means beyond which the range loss does not push them apart."""
    range_alpha: float = 1e-4
    """Weight of the distances within classes in the range loss."""
    range_beta: float = 1e-3
    """Weight of the distance between class means in the range loss."""
    marginal_theta: float = 1.2
    """Squared distance that separates genuine from impostor pairs in the marginal loss."""
    marginal_xi: float = 0.3
    """Error margin of the marginal loss on both sides of --loss.companions.marginal-theta."""

    def __post_init__(self) -> None:
        for name in (*ARGUMENTS, "triplet_margin", "angular_triplet_margin", *PAIR_SETTINGS):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.companions.{name} must be finite and not negative, got {getattr(self, name)}")
        if self.range_k < 1:
            raise ValueError(f"loss.companions.range_k must be at least 1, got {self.range_k}")
        positive, negative = self.contrastive_margins
        if not 0 <= positive <= negative < math.inf:
            raise ValueError(
                f"loss.companions.contrastive_margins must be two ascending numbers, got {positive} {negative}"
            )

    def weights(self) -> dict[str, float]:
        """The positive weights, by name."""
        return {name: getattr(self, name) for name in ARGUMENTS if getattr(self, name) > 0}


class AuxiliaryLosses(nn.Module):
    """Embeddings (N, D), class weights (C, D) or None, and labels (N,) to the weighted auxiliary losses, by name."""

    def __init__(
        self,
        config: AuxiliaryConfig,
        num_classes: int,
        embedding_size: int,
        workspace_mb: float,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        mining = config.triplet_mining
        positive_margin, margin = config.contrastive_margins
        make: dict[str, Callable[[], nn.Module]] = {
            "center": lambda: fm.CenterLoss(num_classes, embedding_size, process_group=process_group),
            "ring": lambda: fm.RingLoss(process_group=process_group),
            "intra": lambda: fm.IntraLoss(process_group=process_group),
            "inter": lambda: fm.InterLoss(workspace_mb=workspace_mb, process_group=process_group),
            "uniform": lambda: fm.UniformLoss(workspace_mb=workspace_mb, process_group=process_group),
            "range": lambda: fm.RangeLoss(
                config.range_k,
                config.range_margin,
                config.range_alpha,
                config.range_beta,
                process_group=process_group,
            ),
            "marginal": lambda: fm.MarginalLoss(config.marginal_theta, config.marginal_xi, process_group=process_group),
            "center_invariant": lambda: fm.CenterInvariantLoss(
                num_classes, embedding_size, process_group=process_group
            ),
            "triplet": lambda: fm.TripletLoss(config.triplet_margin, mining=mining, process_group=process_group),
            "angular_triplet": lambda: fm.AngularTripletLoss(
                config.angular_triplet_margin, mining=mining, process_group=process_group
            ),
            "contrastive": lambda: fm.ContrastiveLoss(
                margin,
                positive_margin,
                form=config.contrastive_form,
                normalize=config.contrastive_normalize,
                average="separate-nonzero",  # most pairs of a batch are impostors beyond the margin
                process_group=process_group,
            ),
            "deepid2": lambda: fm.DeepID2Loss(process_group=process_group),
            "siamese": lambda: fm.SiameseL1Loss(embedding_size, workspace_mb=workspace_mb, process_group=process_group),
        }
        self.weights = config.weights()
        self.losses = nn.ModuleDict({name: make[name]() for name in self.weights})

    def count_images(self, labels: Tensor) -> None:
        """Tells the center-invariant loss how many training images each class has, from the labels of them all."""
        for loss_fn in self.losses.values():
            if isinstance(loss_fn, fm.CenterInvariantLoss):
                loss_fn.class_counts = labels.bincount(minlength=loss_fn.num_classes)

    def class_buffers(self) -> list[str]:
        """Names of the buffers with a row per class, in the state dict."""
        return [
            f"losses.{name}.{buffer}"
            for name, loss_fn in self.losses.items()
            if isinstance(loss_fn, AuxiliaryLoss)
            for buffer in loss_fn.class_buffers()
        ]

    def forward(self, embeddings: Tensor, class_weight: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        given = {"embeddings": embeddings.float(), "class_weight": class_weight, "labels": labels}
        return {
            name: weight * self.losses[name](*(given[argument] for argument in ARGUMENTS[name]))
            for name, weight in self.weights.items()
        }

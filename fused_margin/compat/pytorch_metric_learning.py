"""pytorch-metric-learning's classification losses and its RegularFaceRegularizer, computed by the fused kernels.

Every class is a subclass of the one it replaces and has its constructor, attributes, parameter ``W`` (D, C) and
results; neither the (N, C) logits nor the (C, C) cosines are ever whole. Scratch is bounded by the attribute
``workspace_mb`` (256; see :func:`fused_margin.functional.margin_cross_entropy`), which may be set on a class or an object.

What the kernels do not know, pytorch-metric-learning computes itself, with its memory: a distance other than the
plain cosine or dot product of its own, another ``cross_entropy``, a subclass that redefines a step of the loss.

Different on purpose: gradients are finite at cos = +-1 and zero for zero rows; ``W`` keeps its dtype, whatever the
embeddings' is; the loss of half-precision embeddings is float32; there are no second derivatives.
"""

import math

import torch
from torch import Tensor, nn

from fused_margin._ops.normalization import own_cosines
from fused_margin.functional import linear_cross_entropy, margin_cross_entropy, nearest_class
from fused_margin.margins import Margin

try:
    from pytorch_metric_learning import losses as pml
    from pytorch_metric_learning import regularizers
    from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.utils import common_functions as c_f
    from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
except ModuleNotFoundError as error:
    if error.name != "pytorch_metric_learning":
        raise
    raise ImportError(
        "fused_margin.compat.pytorch_metric_learning needs pytorch-metric-learning: run `pip install pytorch-metric-learning`"
    ) from error

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "RegularFaceRegularizer",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
]

ROWS = 4096  # embeddings looked at together where each is compared with the sub-centers of its class


class FusedLoss:
    """What the losses share, in front of the loss of pytorch-metric-learning in a class's bases."""

    workspace_mb: float = 256
    STEPS: tuple[str, ...] = ()  # the methods that the fused losses stand for

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) before miners, regularizers and the reducer."""
        raise NotImplementedError

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        """The statistics that ``collect_stats`` asks for."""
        record_norms(self.distance, embeddings, self.W.t())

    def is_fused(self) -> bool:
        """Whether the kernels compute this loss: nothing in it is the user's own."""
        cross_entropy = self.cross_entropy
        return (
            is_plain(self.distance)
            and type(cross_entropy) is nn.CrossEntropyLoss
            and cross_entropy.reduction == "none"
            and cross_entropy.label_smoothing == 0
            and all(is_known(getattr(self, name)) for name in self.STEPS)
        )

    def options(self) -> dict:
        return {
            "class_weight": self.cross_entropy.weight,
            "ignore_index": self.cross_entropy.ignore_index,
            "reduction": "none",
            "workspace_mb": self.workspace_mb,
        }

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.follow(embeddings)
        if not self.is_fused():
            embeddings = embeddings.to(self.W.dtype)
            return super().compute_loss(embeddings, labels, indices_tuple, embeddings, labels)
        self.record(embeddings, labels)
        losses = self.element_losses(embeddings, labels)
        losses = losses * lmu.convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        loss_dict = per_element(losses)
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def follow(self, embeddings: Tensor) -> None:
        """``W`` goes to the embeddings' device, the one thing about it that a call may change."""
        if self.W.device != embeddings.device:
            self.cast_types(self.W.dtype, embeddings.device)

    def cast_types(self, dtype, device):
        super().cast_types(self.W.dtype, device)  # an optimizer's parameter keeps its dtype

    def get_logits(self, embeddings):
        """Logits (N, C) of embeddings (N, D) without margin, in the dtype of ``W``."""
        return super().get_logits(embeddings.to(self.W.dtype))


class LargeMarginSoftmaxLoss(FusedLoss, pml.LargeMarginSoftmaxLoss):
    """L-softmax (arXiv:1612.02295, eq. 4 and 6): target ``scale |x| |w| psi(theta)``, psi with an integer factor.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``.
    """

    STEPS = (
        "get_angles",
        "get_cos_with_margin",
        "get_cosine",
        "get_target_mask",
        "modify_cosine_of_target_classes",
        "scale_logits",
    )
    sub_centers = 1

    def is_fused(self) -> bool:
        return super().is_fused() and self.distance.normalize_embeddings

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        super().record(embeddings, labels)
        if self.collect_stats:
            with torch.no_grad():
                own = labels.clamp(0, self.num_classes - 1)  # an ignored label still needs a place to look
                self.get_angles(self.own_cosines(embeddings, own).amax(dim=1))

    def own_cosines(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Cosines (N, sub_centers) of the samples to the centers of their own class."""
        return own_cosines(embeddings, self.W.t(), labels, self.sub_centers).to(self.W.dtype)

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = scaled(embeddings, self.scale)
        return linear_cross_entropy(embeddings, self.W.t(), labels, margin=Margin(m1=self.margin), **self.options())


class SphereFaceLoss(LargeMarginSoftmaxLoss, pml.SphereFaceLoss):
    """SphereFace (arXiv:1704.08063, eq. 7), without annealing: target ``scale |x| psi(theta)``.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.SphereFaceLoss``.
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = scaled(embeddings, self.scale)
        return margin_cross_entropy(embeddings, self.W.t(), labels, Margin(m1=self.margin), None, **self.options())


class CosFaceLoss(LargeMarginSoftmaxLoss, pml.CosFaceLoss):
    """CosFace (arXiv:1801.09414, eq. 4).

    Args, shapes, errors: as ``pytorch_metric_learning.losses.CosFaceLoss``.
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return margin_cross_entropy(
            embeddings, self.W.t(), labels, Margin(m3=self.margin), self.scale, **self.options()
        )


class ArcFaceLoss(LargeMarginSoftmaxLoss, pml.ArcFaceLoss):
    """ArcFace (arXiv:1801.07698, eq. 3); beyond pi it goes on as ``cos(theta) - margin * sin(margin)``.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.ArcFaceLoss``: margin in degrees, kept in radians.
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        margin = Margin(m2=self.margin, beyond_pi="linear")
        return margin_cross_entropy(embeddings, self.W.t(), labels, margin, self.scale, **self.options())


class SubCenterArcFaceLoss(ArcFaceLoss, pml.SubCenterArcFaceLoss):
    """Sub-center ArcFace (ECCV 2020, eq. 3), ``W`` (D, C * sub_centers).

    Args, shapes, errors: as ``pytorch_metric_learning.losses.SubCenterArcFaceLoss``.
    """

    def options(self) -> dict:
        return {**super().options(), "sub_centers": self.sub_centers}

    @torch.no_grad()
    def get_outliers(self, embeddings, labels, threshold=75, return_dominant_centers=True):
        """Samples further than ``threshold`` degrees from the sub-center that most of their class are nearest to.

        Args:
            embeddings: (N, D).
            labels: (N,); samples with a label outside [0, C) are passed over.
            threshold: in degrees.
            return_dominant_centers: for the signature's sake; the centers always come along.

        Returns:
            Indices of the outliers, class by class, and the dominant sub-centers (D, C), zero where a class has no
            sample.
        """
        c_f.check_shapes(embeddings, labels)
        self.follow(embeddings)
        labels = c_f.to_device(labels, embeddings)
        if not self.is_fused():
            return super().get_outliers(embeddings.to(self.W.dtype), labels, threshold, return_dominant_centers)
        own = labels.clamp(0, self.num_classes - 1)
        parts = zip(embeddings.split(ROWS), own.split(ROWS), strict=True)
        cosines = torch.cat([self.own_cosines(*part) for part in parts])  # (N, sub_centers)
        counts = own == labels
        nearest = own * self.sub_centers + cosines.argmax(dim=1)
        votes = torch.bincount(nearest[counts], minlength=self.num_classes * self.sub_centers)
        votes = votes.view(self.num_classes, self.sub_centers)
        dominant = votes.argmax(dim=1)
        outside = cosines.gather(1, dominant[own].unsqueeze(1)).squeeze(1) < math.cos(math.radians(threshold))
        by_class = own.argsort(stable=True)
        outliers = by_class[(outside & counts)[by_class]]
        columns = torch.arange(self.num_classes, device=own.device) * self.sub_centers + dominant
        centers = torch.where(votes.sum(dim=1) > 0, self.W[:, columns], 0.0)
        return outliers, centers.to(embeddings.dtype)


class NormalizedSoftmaxLoss(FusedLoss, pml.NormalizedSoftmaxLoss):
    """Normalised softmax (arXiv:1811.12649): cosines over ``temperature``, no margin.

    With ``distance=DotProductSimilarity(normalize_embeddings=False)`` the embeddings keep their length, as there.
    Args, shapes, errors: as ``pytorch_metric_learning.losses.NormalizedSoftmaxLoss``.
    """

    STEPS = ("get_logits",)

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.distance.collect_stats:
            record_norms(self.distance, embeddings, self.distance.normalize(self.W.detach(), dim=0).t())

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        scale = 1 / self.temperature
        if not self.distance.normalize_embeddings:
            embeddings, scale = scaled(embeddings, scale), None
        return margin_cross_entropy(embeddings, self.W.t(), labels, scale=scale, **self.options())


class RegularFaceRegularizer(regularizers.RegularFaceRegularizer):
    """RegularFace's exclusive term (CVPR 2019, eq. 8) over weights (C, D), C >= 2, in O(C * D) memory.

    Args, reducers: as ``pytorch_metric_learning.regularizers.RegularFaceRegularizer``. Ties go to the lowest class.

    Raises:
        ValueError: for fewer than two classes, of which none has a nearest other one.
    """

    workspace_mb: float = 256

    def compute_loss(self, weights):
        if not is_plain(self.distance) or not self.distance.normalize_embeddings:
            return super().compute_loss(weights)
        record_norms(self.distance, weights, weights)
        return per_element(nearest_class(weights, workspace_mb=self.workspace_mb).cosine)


def is_plain(distance: BaseDistance) -> bool:
    """Whether it is an inner product of rows, normalised by their Euclidean length or not at all."""
    return type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1


def is_known(method) -> bool:
    return method.__module__.partition(".")[0] in ("pytorch_metric_learning", "fused_margin")


def scaled(embeddings: Tensor, scale: float | Tensor) -> Tensor:
    if not isinstance(scale, Tensor) and scale == 1:
        return embeddings
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)) * scale  # half might overflow


def per_element(losses: Tensor) -> dict:
    """What pytorch-metric-learning's reducers take of losses (N,)."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


def record_norms(distance: BaseDistance, query: Tensor, reference: Tensor) -> None:
    """What the distance would have recorded of its operands."""
    if distance.collect_stats:
        distance.reset_stats()
        with torch.no_grad():
            distance.set_default_stats(
                query, reference, distance.maybe_normalize(query), distance.maybe_normalize(reference)
            )

"""pytorch-metric-learning's classification losses and its RegularFaceRegularizer, computed by the fused kernels.

Every class is a subclass of the class that it replaces, with the same constructor, attributes, parameter ``W`` (D, C)
and results. The (N, C) logits and the (C, C) cosines are never stored as a whole. The attribute ``workspace_mb`` (256;
see :func:`fused_margin.functional.margin_cross_entropy`) bounds the scratch memory. It may be set on a class or an
object.

pytorch-metric-learning computes what the kernels do not support, with its own memory: distances other than its
CosineSimilarity and DotProductSimilarity, another ``cross_entropy``, and subclasses that override a step of the loss.

Intended differences: gradients are finite at cos = +-1, and zero for zero rows. ``W`` keeps its dtype for embeddings of
any dtype. The loss of half-precision embeddings is float32. Second derivatives are not supported.
"""

import math
from collections.abc import Callable
from typing import Any

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

ROWS = 4096  # embeddings that are compared at a time with the sub-centers of their classes


class FusedLoss(pml.BaseMetricLossFunction):
    """Base class of the losses. The replaced loss of pytorch-metric-learning must follow it in the bases of a class."""

    workspace_mb: float = 256
    STEPS: tuple[str, ...] = ()  # methods of the replaced loss that the kernels compute
    W: nn.Parameter  # (D, C)
    cross_entropy: nn.Module

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) before miners, regularizers and the reducer."""
        raise NotImplementedError

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        """Record the statistics of ``collect_stats``."""
        record_norms(self.distance, embeddings, self.W.t())

    def is_fused(self) -> bool:
        """Whether the kernels compute this loss, because the user has replaced no part of it."""
        cross_entropy = self.cross_entropy
        return (
            is_plain(self.distance)
            and type(cross_entropy) is nn.CrossEntropyLoss
            and cross_entropy.reduction == "none"
            and cross_entropy.label_smoothing == 0
            and all(is_known(getattr(self, name)) for name in self.STEPS)
        )

    def options(self) -> dict[str, Any]:
        """Arguments that all fused losses have."""
        return {
            "class_weight": self.cross_entropy.weight,
            "ignore_index": self.cross_entropy.ignore_index,
            "reduction": "none",
            "workspace_mb": self.workspace_mb,
        }

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor | None, ref_labels: Tensor | None
    ) -> dict[str, Any]:
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        self.move_to(embeddings.device)
        if not self.is_fused():
            embeddings = embeddings.to(self.W.dtype)
            return super().compute_loss(embeddings, labels, indices_tuple, embeddings, labels)
        self.record(embeddings, labels)
        losses = self.element_losses(embeddings, labels)
        losses = losses * lmu.convert_to_weights(indices_tuple, labels, dtype=losses.dtype)
        loss_dict = per_element(losses)
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def move_to(self, device: torch.device) -> None:
        """Move ``W`` to the embeddings' device, as pytorch-metric-learning does. Its dtype stays."""
        if self.W.device != device:
            self.cast_types(self.W.dtype, device)

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        super().cast_types(self.W.dtype, device)  # an optimizer's parameter keeps its dtype

    def get_logits(self, embeddings):
        """Logits (N, C) of embeddings (N, D) without margin, in the dtype of ``W``."""
        return super().get_logits(embeddings.to(self.W.dtype))


class LargeMarginSoftmaxLoss(FusedLoss, pml.LargeMarginSoftmaxLoss):
    """L-softmax: a multiplicative angular margin on the inner product.

    The logit of the target is ``scale |x| |w| psi(theta)`` (arXiv:1612.02295, eq. 4 and 6), psi with an integer factor.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.LargeMarginSoftmaxLoss``.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> loss_fn = fused.LargeMarginSoftmaxLoss(num_classes=3, embedding_size=3, margin=4, scale=1)
        >>> _ = torch.nn.init.eye_(loss_fn.W)
        >>> round(loss_fn(4 * torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-4))
        0.036
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
                own = labels.clamp(0, self.num_classes - 1)  # an ignored label needs a valid index
                self.get_angles(self.own_cosines(embeddings, own).amax(dim=1))

    def own_cosines(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Cosines (N, sub_centers) of the samples to the centers of their own class."""
        return own_cosines(embeddings, self.W.t(), labels, self.sub_centers).to(self.W.dtype)

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = scaled(embeddings, self.scale)
        return linear_cross_entropy(embeddings, self.W.t(), labels, margin=Margin(m1=self.margin), **self.options())


class SphereFaceLoss(LargeMarginSoftmaxLoss, pml.SphereFaceLoss):
    """SphereFace: a multiplicative angular margin, without annealing.

    The logit of the target is ``scale |x| psi(theta)`` (arXiv:1704.08063, eq. 7).

    Args, shapes, errors: as ``pytorch_metric_learning.losses.SphereFaceLoss``.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> loss_fn = fused.SphereFaceLoss(num_classes=3, embedding_size=3, margin=4, scale=1)
        >>> _ = torch.nn.init.eye_(loss_fn.W)
        >>> round(loss_fn(4 * torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-4))
        0.036
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings = scaled(embeddings, self.scale)
        return margin_cross_entropy(embeddings, self.W.t(), labels, Margin(m1=self.margin), None, **self.options())


class CosFaceLoss(LargeMarginSoftmaxLoss, pml.CosFaceLoss):
    """CosFace: an additive cosine margin (arXiv:1801.09414, eq. 4).

    Args, shapes, errors: as ``pytorch_metric_learning.losses.CosFaceLoss``.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> loss_fn = fused.CosFaceLoss(num_classes=3, embedding_size=3, margin=0.35, scale=4)
        >>> _ = torch.nn.init.eye_(loss_fn.W)
        >>> round(loss_fn(torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-4 (1 - 0.35)))
        0.1385
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return margin_cross_entropy(
            embeddings, self.W.t(), labels, Margin(m3=self.margin), self.scale, **self.options()
        )


class ArcFaceLoss(LargeMarginSoftmaxLoss, pml.ArcFaceLoss):
    """ArcFace: an additive angular margin (arXiv:1801.07698, eq. 3).

    Where theta + margin exceeds pi, the target cosine is ``cos(theta) - margin * sin(margin)``.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.ArcFaceLoss``. The argument ``margin`` is in degrees, the
    attribute in radians.

    Examples:
        >>> import torch
        >>> from pytorch_metric_learning import losses
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> before, after = losses.ArcFaceLoss(10, 4), fused.ArcFaceLoss(10, 4)
        >>> after.load_state_dict(before.state_dict())
        <All keys matched successfully>
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 3, 7, 9])
        >>> torch.allclose(before(embeddings, labels), after(embeddings, labels), rtol=1e-4)
        True
    """

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        margin = Margin(m2=self.margin, beyond_pi="linear")
        return margin_cross_entropy(embeddings, self.W.t(), labels, margin, self.scale, **self.options())


class SubCenterArcFaceLoss(ArcFaceLoss, pml.SubCenterArcFaceLoss):
    """Sub-center ArcFace: ArcFace with several centers per class (ECCV 2020, eq. 3).

    ``W`` is (D, C * sub_centers), class by class.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.SubCenterArcFaceLoss``.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> loss_fn = fused.SubCenterArcFaceLoss(num_classes=10, embedding_size=4, sub_centers=3)
        >>> loss_fn.W.shape
        torch.Size([4, 30])
        >>> outliers, centers = loss_fn.get_outliers(torch.eye(4), torch.tensor([0, 3, 7, 9]))
        >>> centers.shape
        torch.Size([4, 10])
    """

    def options(self) -> dict[str, Any]:
        return {**super().options(), "sub_centers": self.sub_centers}

    @torch.no_grad()
    def get_outliers(self, embeddings, labels, threshold=75, return_dominant_centers=True):
        """Samples with an angle above ``threshold`` to the dominant sub-center of their class.

        The dominant sub-center is the nearest one of most samples of the class.

        Args:
            embeddings: (N, D).
            labels: (N,); samples with a label outside [0, C) are ignored.
            threshold: in degrees.
            return_dominant_centers: has no effect, as in pytorch-metric-learning; the centers are always returned.

        Returns:
            Indices of the outliers, by class, and the dominant sub-centers (D, C), zero for classes without a sample.
        """
        c_f.check_shapes(embeddings, labels)
        self.move_to(embeddings.device)
        labels = c_f.to_device(labels, embeddings)
        if not self.is_fused():
            return super().get_outliers(embeddings.to(self.W.dtype), labels, threshold, return_dominant_centers)
        own = labels.clamp(0, self.num_classes - 1)
        parts = zip(embeddings.split(ROWS), own.split(ROWS), strict=True)
        cosines = torch.cat([self.own_cosines(*part) for part in parts])  # (N, sub_centers)
        valid = own == labels
        nearest = own * self.sub_centers + cosines.argmax(dim=1)
        votes = torch.bincount(nearest[valid], minlength=self.num_classes * self.sub_centers)
        votes = votes.view(self.num_classes, self.sub_centers)
        dominant = votes.argmax(dim=1)
        outside = cosines.gather(1, dominant[own].unsqueeze(1)).squeeze(1) < math.cos(math.radians(threshold))
        by_class = own.argsort(stable=True)
        outliers = by_class[(outside & valid)[by_class]]
        columns = torch.arange(self.num_classes, device=own.device) * self.sub_centers + dominant
        centers = torch.where(votes.sum(dim=1) > 0, self.W[:, columns], 0.0)
        return outliers, centers.to(embeddings.dtype)


class NormalizedSoftmaxLoss(FusedLoss, pml.NormalizedSoftmaxLoss):
    """Normalized softmax: cosines divided by ``temperature``, without a margin (arXiv:1811.12649).

    With ``distance=DotProductSimilarity(normalize_embeddings=False)`` the embeddings are not normalized.

    Args, shapes, errors: as ``pytorch_metric_learning.losses.NormalizedSoftmaxLoss``.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> loss_fn = fused.NormalizedSoftmaxLoss(num_classes=3, embedding_size=3, temperature=0.25)
        >>> _ = torch.nn.init.eye_(loss_fn.W)
        >>> round(loss_fn(torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-1 / 0.25))
        0.036
    """

    STEPS = ("get_logits",)

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.distance.collect_stats:
            record_norms(self.distance, embeddings, self.distance.normalize(self.W.detach(), dim=0).t())

    def element_losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        scale: float | None = 1 / self.temperature
        if not self.distance.normalize_embeddings:
            embeddings, scale = scaled(embeddings, 1 / self.temperature), None
        return margin_cross_entropy(embeddings, self.W.t(), labels, scale=scale, **self.options())


class RegularFaceRegularizer(regularizers.RegularFaceRegularizer):
    """RegularFace's exclusive term: the mean cosine of the classes to their nearest other class.

    It is computed over weights (C, D), C >= 2, in O(C * D) memory (CVPR 2019, eq. 8).

    Args, reducers: as ``pytorch_metric_learning.regularizers.RegularFaceRegularizer``. If several classes are
    equally near, the one with the lowest index is used.

    Raises:
        ValueError: there are fewer than two classes.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import pytorch_metric_learning as fused
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> round(fused.RegularFaceRegularizer()(weight).item(), 4)  # (cos 45 + cos 45 + cos 135 degrees) / 3
        0.2357
    """

    workspace_mb: float = 256

    def compute_loss(self, weights: Tensor) -> dict[str, Any]:
        if not is_plain(self.distance) or not self.distance.normalize_embeddings:
            return super().compute_loss(weights)
        record_norms(self.distance, weights, weights)
        return per_element(nearest_class(weights, workspace_mb=self.workspace_mb).cosine)


def is_plain(distance: BaseDistance) -> bool:
    """Whether a distance is an inner product of rows, which are L2-normalized or not normalized."""
    return type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.p == 2 and distance.power == 1


def is_known(method: Callable[..., Any]) -> bool:
    """Whether pytorch-metric-learning or this package defines a method."""
    return method.__module__.partition(".")[0] in ("pytorch_metric_learning", "fused_margin")


def scaled(embeddings: Tensor, scale: float | Tensor) -> Tensor:
    if not isinstance(scale, Tensor) and scale == 1:
        return embeddings
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)) * scale  # half might overflow


def per_element(losses: Tensor) -> dict[str, Any]:
    """Losses (N,) as input of pytorch-metric-learning's reducers."""
    indices = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}


def record_norms(distance: BaseDistance, query: Tensor, reference: Tensor) -> None:
    """Record the statistics that a distance with ``collect_stats`` records of its operands."""
    if distance.collect_stats:
        distance.reset_stats()
        with torch.no_grad():
            distance.set_default_stats(
                query, reference, distance.maybe_normalize(query), distance.maybe_normalize(reference)
            )

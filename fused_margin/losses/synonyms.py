"""Losses that equal CosFace or NormFace, under the names and with the settings of their own papers."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import Unpack

from fused_margin import _checks
from fused_margin.losses.margin import CosFaceLoss, NormFaceLoss
from fused_margin.losses.options import MarginOptions

# A loss that is as good as 0: the default alpha of CoCoLoss makes it the loss of a sample among orthogonal centroids.
COCO_LOSS = 1e-4


class AMSoftmaxLoss(CosFaceLoss):
    """AM-Softmax (additive margin softmax): :class:`fused_margin.CosFaceLoss` with a scale of 30.

    ::

        loss_i = -log(exp(s (cos_{y_i} - m)) / (exp(s (cos_{y_i} - m)) + sum_{j != y_i} exp(s cos_j)))

    Wang, Cheng, Liu and Liu, "Additive Margin Softmax for Face Verification", IEEE Signal Processing Letters 2018
    (arXiv:1801.05599). CosFace was published at the same time, with the same formula.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: m, the cosine to subtract.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.AMSoftmaxLoss(num_classes=10, embedding_size=4)
        >>> loss_fn.margin, loss_fn.scale
        (0.35, 30.0)
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float | Tensor | None = 30.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, margin, scale, **options)


class CoCoLoss(NormFaceLoss):
    """CoCo (congenerous cosine loss): :class:`fused_margin.NormFaceLoss` whose scale is called alpha.

    With learned class centroids c, which are the class weights::

        loss_i = -log(exp(f_i . c_{y_i}) / sum_j exp(f_i . c_j)),   f_i = alpha x_i / |x_i|,   |c_j| = 1

    Liu, Li and Wang, "Rethinking Feature Discrimination and Polymerization for Large-scale Recognition", NIPS workshops
    2017 (arXiv:1710.00870), which is version 2 of the loss; version 1 (arXiv:1702.06890) computed the centroids from the
    batch.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        alpha: length of the embeddings, which is the scale of the cosines. None is ``log((C - 1) / (exp(1e-4) - 1))``, at
            which the loss is 1e-4 for an embedding at its centroid if all centroids are orthogonal. This rule is ours.
            For 87,020 classes, as in the authors' published face network, it gives 20.6, and they use 21.475.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        alpha: the same number as ``scale``; may be set between steps.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> round(fused_margin.CoCoLoss(num_classes=87_020, embedding_size=4).alpha, 1)
        20.6
        >>> fused_margin.CoCoLoss(num_classes=10, embedding_size=4, alpha=16.0).scale
        16.0
    """

    def __init__(
        self, num_classes: int, embedding_size: int, alpha: float | None = None, **options: Unpack[MarginOptions]
    ):
        if alpha is None:
            classes = max(2, _checks.positive_index("num_classes", num_classes))
            alpha = math.log((classes - 1) / math.expm1(COCO_LOSS))
        super().__init__(num_classes, embedding_size, positive_number("alpha", alpha), **options)

    @property
    def alpha(self) -> float | Tensor | None:
        return self.scale

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.scale = positive_number("alpha", value)


class VMFLoss(NormFaceLoss):
    """vMF mixture loss: :class:`fused_margin.NormFaceLoss` whose scale is called kappa.

    Minus the log posterior of a mixture of C von Mises-Fisher distributions on the sphere, with equal weights, one
    concentration kappa and learned mean directions mu, which are the class weights. Their normalizers cancel::

        loss_i = -log(exp(kappa mu_{y_i} . x_i) / sum_j exp(kappa mu_j . x_i)),   |mu_j| = |x_i| = 1

    Hasnat et al., "von Mises-Fisher Mixture Model-based Deep learning: Application to Face Verification", 2017
    (arXiv:1706.04264).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        kappa: concentration of the distributions, which is the scale of the cosines.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        kappa: the same number as ``scale``; may be set between steps.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.VMFLoss(num_classes=10, embedding_size=4)
        >>> loss_fn.kappa
        16.0
    """

    def __init__(self, num_classes: int, embedding_size: int, kappa: float = 16.0, **options: Unpack[MarginOptions]):
        super().__init__(num_classes, embedding_size, positive_number("kappa", kappa), **options)

    @property
    def kappa(self) -> float | Tensor | None:
        return self.scale

    @kappa.setter
    def kappa(self, value: float) -> None:
        self.scale = positive_number("kappa", value)


def positive_number(name: str, value: float) -> float:
    _checks.number(name, value, 0.0, open_low=True)
    return value

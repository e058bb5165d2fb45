"""Losses with one margin for all samples: ArcFace, CosFace, NormFace, SphereFace and combinations of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_margin.losses import settings
from fused_margin.losses.base import ClassificationLoss, MarginLoss
from fused_margin.losses.options import MarginOptions, SubCenterOptions
from fused_margin.losses.running_state import RunningState, once_per_step
from fused_margin.margins import Margin


class ArcFaceLoss(MarginLoss):
    """ArcFace: an additive angular margin.

    ``psi(theta) = cos(theta + margin)`` (arXiv:1801.07698, eq. 3).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: angle in radians.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: exclusive_weight, class_weight, reduction, ignore_index, label_smoothing, sub_centers, process_group,
            sample_rate, workspace_mb and others; see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialized N(0, 0.01). It need not be normalized.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.ArcFaceLoss(num_classes=3, embedding_size=3, scale=4.0)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> embeddings, labels = torch.eye(3), torch.arange(3)  # every angle to the own class is 0
        >>> round(loss_fn(embeddings, labels).item(), 4)  # log(1 + 2 exp(-4 cos(0.5)))
        0.0581
        >>> loss_fn.margin = 0.0  # between steps: a margin schedule
        >>> round(loss_fn(embeddings, labels).item(), 4)
        0.036
        >>> loss_fn.logits(embeddings).shape
        torch.Size([3, 3])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"margin": settings.angle(-math.inf)}
    NUMBERS: ClassVar[dict[str, str]] = {"margin": "m2"}
    margin: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin = margin


class SubCenterArcFaceLoss(MarginLoss):
    """Sub-center ArcFace: ArcFace with several centers per class, for noisy labels.

    The cosine to a class is the cosine to its nearest center (ECCV 2020, eq. 3).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: angle in radians.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        sub_centers: rows of ``weight`` per class, class by class: ``weight`` is (C * sub_centers, D).
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.SubCenterArcFaceLoss(num_classes=10, embedding_size=4, sub_centers=3)
        >>> loss_fn.weight.shape
        torch.Size([30, 4])
        >>> loss_fn.logits(torch.randn(2, 4)).shape
        torch.Size([2, 10])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"margin": settings.angle(-math.inf)}
    NUMBERS: ClassVar[dict[str, str]] = {"margin": "m2"}
    margin: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float | Tensor | None = 64.0,
        sub_centers: int = 3,
        **options: Unpack[SubCenterOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, sub_centers=sub_centers, **options)
        self.margin = margin


class CosFaceLoss(MarginLoss):
    """CosFace: an additive cosine margin.

    ``psi(theta) = cos(theta) - margin`` (arXiv:1801.09414, eq. 4).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: cosine to subtract.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.CosFaceLoss(num_classes=3, embedding_size=3, margin=0.35, scale=4.0)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> loss = loss_fn(torch.eye(3), torch.arange(3))
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-4 (1 - 0.35)))
        0.1385
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"margin": settings.number(-math.inf)}
    NUMBERS: ClassVar[dict[str, str]] = {"margin": "m3"}
    margin: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin = margin


class NormFaceLoss(MarginLoss):
    """NormFace: softmax over scaled cosines, without a margin.

    ``psi(theta) = cos(theta)`` (arXiv:1704.06369).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.NormFaceLoss(num_classes=3, embedding_size=3, scale=4.0)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> loss = loss_fn(torch.eye(3), torch.arange(3))
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-4))
        0.036
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)


class CombinedMarginLoss(MarginLoss):
    """Combined margin: SphereFace's, ArcFace's and CosFace's margin together.

    ``psi(theta) = cos(m1 * theta + m2) - m3`` (arXiv:1801.07698, eq. 4). :data:`fused_margin.margins.CM1` and
    :data:`fused_margin.margins.CM2` are the paper's numbers.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        m1: factor on the angle.
        m2: angle in radians.
        m3: cosine to subtract.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> from fused_margin.margins import CM2
        >>> loss_fn = fused_margin.CombinedMarginLoss(num_classes=3, embedding_size=3, scale=4.0, **CM2)
        >>> loss_fn
        CombinedMarginLoss(num_classes=3, embedding_size=3, scale=4.0, m1=0.9, m2=0.4, m3=0.15)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> round(loss_fn(torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-4 (cos(0.4) - 0.15)))
        0.0876
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = dict.fromkeys(("m1", "m2", "m3"), settings.margin_number)
    NUMBERS: ClassVar[dict[str, str]] = {"m1": "m1", "m2": "m2", "m3": "m3"}
    m1: float
    m2: float
    m3: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.m1, self.m2, self.m3 = m1, m2, m3


class ModifiedSoftmaxLoss(MarginLoss):
    """Modified softmax: the norm of the embedding is the scale, and there is no margin.

    The logits are ``|x_i| cos_ij`` (arXiv:1704.08063, eq. 5).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.ModifiedSoftmaxLoss(num_classes=3, embedding_size=3)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> loss = loss_fn(4.0 * torch.eye(3), torch.arange(3))
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-4)), because every norm is 4
        0.036
    """

    def __init__(self, num_classes: int, embedding_size: int, **options: Unpack[MarginOptions]):
        super().__init__(num_classes, embedding_size, {}, None, **options)


class AnnealedMargin(RunningState, ClassificationLoss):
    """A loss with SphereFace's annealing of its margin."""

    margin: float
    annealing: bool
    iteration: Tensor
    RUNNING_BUFFERS = ("iteration",)
    SETTINGS: ClassVar[dict[str, settings.Check]] = {"margin": settings.number(1.0), "annealing": settings.boolean}

    def setting_changed(self, name: str) -> None:
        super().setting_changed(name)
        if name == "annealing" and self.annealing and "iteration" not in self._buffers:
            self.register_buffer("iteration", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    def annealed(self, margin: Margin) -> Margin:
        """The margin with the annealing of this iteration."""
        if not self.annealing:
            return margin
        strength = torch.clamp(1000.0 / (1.0 + 0.12 * self.iteration.double()), min=5.0)
        return replace(margin, annealing=strength)

    def count_iteration(self) -> None:
        """Counts a forward in training mode, after its loss: a call that raises does not count."""
        if self.training and self.annealing:
            self.update_state("iteration", self.iteration + 1)


class SphereFaceLoss(AnnealedMargin, MarginLoss):
    """SphereFace (A-Softmax): a multiplicative angular margin.

    ``psi(theta) = (-1)^k cos(margin * theta) - 2k`` with ``k = floor(margin * theta / pi)`` (arXiv:1704.08063, eq. 7).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: factor on the angle, any real number >= 1.
        scale: s of the logits. None uses the norm of each embedding, as in the paper.
        annealing: start near plain softmax, as in the published code: the target cosine is
            ``(lambda * cos(theta) + psi) / (1 + lambda)`` with lambda = max(5, 1000 / (1 + 0.12 * iteration)). Every
            forward in training mode is an iteration.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        iteration: int64 buffer, only with annealing. It is saved in the state dict.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import math, torch, fused_margin
        >>> loss_fn = fused_margin.SphereFaceLoss(num_classes=2, embedding_size=2, margin=2, annealing=False)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> angle = math.pi / 6  # to class 0; psi = cos(2 * 30 degrees) = 0.5
        >>> loss = loss_fn(torch.tensor([[math.cos(angle), math.sin(angle)]]), torch.tensor([0]))
        >>> round(loss.item(), 4)  # log(1 + exp(cos(60 degrees) - 0.5))
        0.6931
    """

    NUMBERS: ClassVar[dict[str, str]] = {"margin": "m1"}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float | Tensor | None = None,
        annealing: bool = True,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin, self.annealing = margin, annealing

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        return self.annealed(self.margin_function)

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        self.count_iteration()
        return loss

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
    """ArcFace: an additive angular margin, ``psi = cos(theta + margin)`` (arXiv:1801.07698, eq. 3).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: angle in radians.
        scale: s of the logits.
        **options: exclusive_weight, class_weight, reduction, ignore_index, label_smoothing, sub_centers, process_group,
            sample_rate, workspace_mb and others; see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialized N(0, 0.01). It need not be normalized.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """Sub-center ArcFace: ArcFace with the nearest of several centers per class (ECCV 2020, eq. 3), for noisy labels.

    Args:
        num_classes: C.
        embedding_size: D.
        margin: angle in radians.
        scale: s of the logits.
        sub_centers: rows of ``weight`` per class, class by class: ``weight`` is (C * sub_centers, D).
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """CosFace: an additive cosine margin, ``psi = cos(theta) - margin`` (arXiv:1801.09414, eq. 4).

    Args:
        num_classes: C.
        embedding_size: D.
        margin: cosine to subtract.
        scale: s of the logits.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """NormFace: softmax over scaled cosines, without margin (arXiv:1704.06369).

    Args:
        num_classes: C.
        embedding_size: D.
        scale: s of the logits.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """The combined margin of three numbers, ``psi = cos(m1 * theta + m2) - m3`` (arXiv:1801.07698, eq. 4).

    Args:
        num_classes: C.
        embedding_size: D.
        m1: factor on the angle.
        m2: angle in radians.
        m3: cosine to subtract.
        scale: s of the logits.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """Modified softmax: A-Softmax without margin, with the logits ``|x_i| cos_ij`` (arXiv:1704.08063, eq. 5).

    Args:
        num_classes: C.
        embedding_size: D.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.
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
    """SphereFace / A-Softmax: a multiplicative angular margin (arXiv:1704.08063, eq. 7).

    Args:
        num_classes: C.
        embedding_size: D.
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

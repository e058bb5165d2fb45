"""Losses over inner products, with class weights that are not normalized: softmax, L2-softmax, L-softmax."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from fused_margin import _C, _checks
from fused_margin._cross_entropy import linear_cross_entropy
from fused_margin.losses import settings
from fused_margin.losses.base import PROBABILITY, ClassificationLoss
from fused_margin.losses.margin import AnnealedMargin
from fused_margin.losses.options import ClassificationOptions
from fused_margin.losses.running_state import once_per_step
from fused_margin.margins import Margin
from fused_margin.nearest import exclusive_regularization


class SoftmaxLoss(ClassificationLoss):
    """Plain softmax: cross-entropy over inner products of embeddings and class weights.

    The logits ``x_i . w_j + b_j`` are computed in chunks. They are those of a ``torch.nn.Linear`` before
    ``torch.nn.CrossEntropyLoss``.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        bias: whether to learn a (C,) ``bias``, initialized 0.
        **options: see :class:`fused_margin.MarginLoss`; ``beyond_pi``, ``easy``, ``gradient`` and ``sub_centers``
            belong to the losses over cosines. If ``process_group`` divides the classes, it divides ``bias`` too. The
            gradient of ``bias`` is dense.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialized as in ``torch.nn.Linear``. If classes are divided, it holds the classes of
            this rank.
        bias: (C,) parameter, or None.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.SoftmaxLoss(num_classes=10, embedding_size=4)
        >>> embeddings, labels = torch.randn(2, 4), torch.tensor([3, 7])
        >>> expected = torch.nn.functional.cross_entropy(loss_fn.logits(embeddings), labels)
        >>> torch.allclose(loss_fn(embeddings, labels), expected, atol=1e-5)
        True
    """

    bias: nn.Parameter | None

    def __init__(
        self, num_classes: int, embedding_size: int, bias: bool = True, **options: Unpack[ClassificationOptions]
    ):
        super().__init__(num_classes, embedding_size, **options)
        if self.sub_centers > 1:
            raise ValueError(f"sub_centers: expected 1 with inner products, got {self.sub_centers}")
        self.register_parameter("bias", nn.Parameter(torch.empty_like(self.weight[:, 0])) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if len(self.weight):  # there may be more ranks than classes
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (N, D), float32, float64, float16 or bfloat16.
            labels: (N,) integers in [0, C), or ``ignore_index``.

        Returns:
            Scalar, or (N,) with ``reduction="none"``; float64 if an input is, else float32.
        """
        _checks.batch(embeddings, self.weight, labels, at_least=1 if self.shard is None else 0)
        _checks.per_class("bias", self.bias, self.weight, len(self.weight))
        if self.class_weight is not None or self.sub_centers > 1 or self.shard is not None:
            self.check_parameters()
        loss = linear_cross_entropy(
            self.features(embeddings),
            self.weight,
            labels,
            self.bias,
            self.target_margin(),
            **self.cross_entropy_options(),
        )
        if self.has_exclusive_term:
            loss = loss + self.exclusive_weight * exclusive_regularization(
                self.weight,
                nearest=None if self.exclusive is None else self.nearest(),
                shard=self.shard,
                workspace_mb=self.workspace_mb,
            )
        return loss

    def class_parameters(self) -> dict[str, nn.Parameter]:
        return super().class_parameters() | ({} if self.bias is None else {"bias": self.bias})

    def features(self, embeddings: Tensor) -> Tensor:
        """The left operand of the logits' inner products."""
        return embeddings

    def target_margin(self) -> Margin | None:
        """The margin on the target in this step, or None."""
        return None

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin, for inference.

        Args:
            embeddings: (N, D).

        Returns:
            (N, C). If classes are divided, C is the number of classes of this rank.
        """
        _checks.embeddings_for(embeddings, self.weight, at_least=0)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(self.features(embeddings).to(dtype), self.weight.to(dtype), bias)


class L2SoftmaxLoss(SoftmaxLoss):
    """L2-softmax: softmax over embeddings of equal length.

    The embeddings become ``alpha x_i / |x_i|`` (arXiv:1703.09507, eq. 3).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        alpha: length of the embeddings. None learns it, starting at the paper's lower bound (eq. 5, probability 0.9).
            Setting a number fills a learned alpha; setting None replaces a number by a learned alpha.
        bias: whether to learn a (C,) ``bias``, initialized 0.
        **options: see :class:`fused_margin.MarginLoss`, and :class:`fused_margin.SoftmaxLoss` for exceptions.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter.
        bias: (C,) parameter, or None.
        alpha: a number, or a 0-d parameter if it is learned.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.L2SoftmaxLoss(num_classes=1000, embedding_size=4)  # learns alpha
        >>> round(loss_fn.alpha.item(), 2)  # log(0.9 * 998 / 0.1)
        9.1
        >>> loss_fn(torch.randn(2, 4), torch.tensor([3, 7])).shape
        torch.Size([])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"alpha": settings.alpha}
    alpha: float | nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float | None = None,
        bias: bool = True,
        **options: Unpack[ClassificationOptions],
    ):
        settings.alpha("alpha", alpha)
        super().__init__(num_classes, embedding_size, bias, **options)
        self.alpha = alpha  # type: ignore[assignment]  # store_setting replaces None by a parameter

    def store_setting(self, name: str, value: Any) -> None:
        learned = name == "alpha" and "alpha" in self._parameters
        if name == "alpha" and value is None:
            value = lower_bound(self.num_classes)
            if not learned:
                value = nn.Parameter(self.weight.new_tensor(value, requires_grad=False))
        if learned and not isinstance(value, nn.Parameter):
            with torch.no_grad():
                self._parameters["alpha"].fill_(value)  # type: ignore[union-attr]  # a learned alpha is a parameter
        else:
            super().store_setting(name, value)

    def features(self, embeddings: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=torch.float64)
        short = norm < _C.SMALLEST_NORM  # a zero embedding stays zero, with a gradient of zero
        return (
            embeddings * torch.where(short, 0.0, self.all_reduce_gradient(self.alpha) / torch.where(short, 1.0, norm))
        ).to(torch.promote_types(embeddings.dtype, torch.float32))

    def own_repr(self) -> list[str]:
        return [f"alpha={self.alpha if isinstance(self.alpha, float | int) else 'learned'}"]


class LSoftmaxLoss(AnnealedMargin, SoftmaxLoss):
    """L-softmax: a multiplicative angular margin on the inner product.

    The logit of the target is ``|x_i| |w_y| psi(theta_i)`` (arXiv:1612.02295, eq. 4 and 6), with psi as in
    :class:`fused_margin.SphereFaceLoss`.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: factor on the angle, any real number >= 1.
        annealing: as in :class:`fused_margin.SphereFaceLoss`.
        **options: see :class:`fused_margin.MarginLoss`, and :class:`fused_margin.SoftmaxLoss` for exceptions. Label
            smoothing is not supported.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        iteration: int64 buffer, only with annealing. It is saved in the state dict.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import math, torch, fused_margin
        >>> loss_fn = fused_margin.LSoftmaxLoss(num_classes=2, embedding_size=2, margin=2, annealing=False)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> angle = math.pi / 6  # to class 0; psi = cos(2 * 30 degrees) = 0.5
        >>> loss = loss_fn(torch.tensor([[math.cos(angle), math.sin(angle)]]), torch.tensor([0]))
        >>> round(loss.item(), 4)  # log(1 + exp(cos(60 degrees) - 0.5))
        0.6931
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        annealing: bool = True,
        **options: Unpack[ClassificationOptions],
    ):
        super().__init__(num_classes, embedding_size, bias=False, **options)
        self.margin, self.annealing = margin, annealing

    def check_together(self, values: dict[str, Any]) -> None:
        super().check_together(values)
        _checks.absent("a margin", label_smoothing=values.get("label_smoothing", 0.0))

    @property
    def margin_function(self) -> Margin:
        return Margin(m1=self.margin)

    @margin_function.setter
    def margin_function(self, value: Margin) -> None:
        _checks.instance("margin_function", value, Margin)
        numbers = (value.m1, value.m2, value.m3, value.annealing)
        if any(isinstance(number, Tensor) for number in numbers) or value != Margin(m1=value.m1):
            raise ValueError(f"margin_function: expected m1 alone in LSoftmaxLoss, got {value}")
        self.margin = value.m1  # type: ignore[assignment]  # not a tensor

    def target_margin(self) -> Margin:
        return self.annealed(self.margin_function)

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        self.count_iteration()
        return loss

    def own_repr(self) -> list[str]:
        return [f"margin={self.margin}"]


def lower_bound(num_classes: int, probability: float = PROBABILITY) -> float:
    """Length at which a sample can reach `probability` for one of C classes (arXiv:1703.09507, eq. 5); at least 1."""
    return max(1.0, math.log(max(1.0, probability * (num_classes - 2) / (1 - probability))))

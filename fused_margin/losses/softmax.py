"""Losses over inner products, with class weights whose length matters: softmax, L2-softmax, L-softmax."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin.functional import exclusive_regularization, linear_cross_entropy
from fused_margin.losses import settings
from fused_margin.losses.margin import AnnealedMargin, ClassificationLoss
from fused_margin.losses.running_state import once_per_step
from fused_margin.margins import Margin

ARGUMENTS = """

    Args:
        num_classes: C.
        embedding_size: D.
{own}
        exclusive_weight: lambda of RegularFace's exclusive term, added to the loss in a sweep of its own.
        class_weight: (C,) factors, as ``weight`` in ``torch.nn.CrossEntropyLoss``. A buffer.
        reduction, ignore_index, label_smoothing: as in ``torch.nn.CrossEntropyLoss``{smoothing}.
        process_group, sample_rate, sparse: as in :class:`fused_margin.ArcFaceLoss`; a bias is divided as ``weight`` is,
            and its gradient is dense.
        workspace_mb: bound on scratch memory in MiB, whatever C is.
        device, dtype: of the parameters.

    Arguments can be set as attributes between steps, see :class:`fused_margin.ArcFaceLoss`; ``bias`` is a parameter.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        weight: (C, D) parameter, initialised as that of ``torch.nn.Linear``. Of this rank's classes, if divided.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
"""
OWN_BIAS = "        bias: with a learned (C,) ``bias``, initialised 0."


class SoftmaxLoss(ClassificationLoss):
    __doc__ = "Plain softmax: cross-entropy over ``x_i . w_j + b_j``, with nothing of size N x C." + ARGUMENTS.format(
        own=OWN_BIAS, smoothing=""
    )

    def __init__(self, num_classes: int, embedding_size: int, bias: bool = True, **options):
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
        _checks.batch(embeddings, self.weight, labels, at_least=1 if self.shard is None else 0)
        loss = linear_cross_entropy(
            self.features(embeddings),
            self.weight_of_step(),
            labels,
            self.bias,
            self.target_margin(),
            shard=self.current_shard(),
            **self.cross_entropy_options(),
        )
        if self.has_exclusive_term:
            loss = loss + self.exclusive_weight * exclusive_regularization(
                self.weight, nearest=self.nearest(), shard=self.current_shard(), workspace_mb=self.workspace_mb
            )
        return loss

    def class_parameters(self) -> dict[str, nn.Parameter]:
        return super().class_parameters() | ({} if self.bias is None else {"bias": self.bias})

    def features(self, embeddings: Tensor) -> Tensor:
        """What the class weights are multiplied with."""
        return embeddings

    def target_margin(self) -> Margin | None:
        """The margin of this step, on the target."""
        return None

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits (N, C) of embeddings (N, D), without margin, for inference. Of this rank's classes, if divided."""
        _checks.embeddings_for(embeddings, self.weight, at_least=0)
        dtype = torch.promote_types(embeddings.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(self.features(embeddings).to(dtype), self.weight.to(dtype), bias)


class L2SoftmaxLoss(SoftmaxLoss):
    __doc__ = (
        "L2-softmax: softmax over embeddings of one length, ``alpha x_i / |x_i|`` (arXiv:1703.09507, eq. 3)."
        + ARGUMENTS.format(
            own="        alpha: the length; None learns it, from the paper's lower bound (eq. 5, probability 0.9) on. A number\n"
            "            set later fills what is learned, and None makes a number a parameter.\n" + OWN_BIAS,
            smoothing="",
        )
    )

    SETTINGS: ClassVar = {"alpha": settings.length}

    def __init__(self, num_classes: int, embedding_size: int, alpha: float | None = None, bias: bool = True, **options):
        settings.length("alpha", alpha)
        super().__init__(num_classes, embedding_size, bias, **options)
        self.alpha = alpha

    def keep_setting(self, name: str, value: Any) -> None:
        learned = name == "alpha" and "alpha" in self._parameters
        if name == "alpha" and value is None:
            value = lower_bound(self.num_classes)
            if not learned:
                value = nn.Parameter(self.weight.new_tensor(value, requires_grad=False))
        if learned and not isinstance(value, nn.Parameter):
            with torch.no_grad():
                self.alpha.fill_(value)  # it stays learned
        else:
            super().keep_setting(name, value)

    def features(self, embeddings: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=torch.float64)
        short = norm < 1e-12  # a zero embedding stays zero, and so does its gradient
        return (embeddings * torch.where(short, 0.0, self.shared(self.alpha) / torch.where(short, 1.0, norm))).to(
            torch.promote_types(embeddings.dtype, torch.float32)
        )

    def own_repr(self) -> list[str]:
        return [f"alpha={self.alpha if isinstance(self.alpha, float | int) else 'learned'}"]


class LSoftmaxLoss(AnnealedMargin, SoftmaxLoss):
    __doc__ = (
        "L-softmax: a multiplicative angular margin, ``|x_i| |w_y| psi(theta_i)`` (arXiv:1612.02295, eq. 4 and 6)."
        + ARGUMENTS.format(
            own="        margin: factor on the angle, any real number >= 1.\n"
            "        annealing: as in :class:`fused_margin.SphereFaceLoss`.",
            smoothing=" (no smoothing)",
        )
        + "        iteration: int64 buffer (only with annealing), saved in the state dict.\n"
    )

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 4, annealing: bool = True, **options):
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
        _checks.margin(value)
        if value != Margin(m1=value.m1):
            raise ValueError(f"margin_function: expected m1 alone in LSoftmaxLoss, got {value}")
        self.margin = value.m1

    def target_margin(self) -> Margin:
        return self.annealed_margin()

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        self.count_iteration()
        return loss

    def own_repr(self) -> list[str]:
        return [f"margin={self.margin}"]


def lower_bound(num_classes: int, probability: float = 0.9) -> float:
    """Length at which a sample of C classes can reach `probability` (arXiv:1703.09507, eq. 5); at least 1."""
    return max(1.0, math.log(max(1.0, probability * (num_classes - 2) / (1 - probability))))

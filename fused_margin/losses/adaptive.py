"""Losses whose margin depends on the sample: AdaFace, MagFace, ElasticFace, CurricularFace."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_margin import _checks
from fused_margin._cross_entropy import mean_over
from fused_margin._ops.collectives import divided_target_cosines
from fused_margin._ops.normalization import target_cosines
from fused_margin.losses import settings
from fused_margin.losses.base import MarginLoss
from fused_margin.losses.options import MarginOptions
from fused_margin.losses.running_state import RunningState, once_per_step
from fused_margin.margins import HardNegatives, Margin, psi, warn_of_degrees


class AdaFaceLoss(RunningState, MarginLoss):
    """AdaFace: the margin depends on the norm of the embedding, a measure of image quality.

    With z, the norm standardized by running statistics and clamped to [-1, 1] (arXiv:2204.00964, eq. 12 to 15)::

        psi(theta) = cos(theta - margin * z) - (margin + margin * z)

    ``theta - margin * z`` is clamped to [0, pi]. No gradient flows through z.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: m of the formula, both an angle in radians and a cosine.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        concentration: h; z is +-1 at 1 / h standard deviations from the mean.
        momentum: share of the running statistics that a batch replaces.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        norm_mean: (1,) float64 buffer, the running mean of the norm. Every forward in training mode updates it.
        norm_std: (1,) float64 buffer, the running standard deviation of the norm.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.AdaFaceLoss(num_classes=10, embedding_size=4)
        >>> loss = loss_fn(torch.full((2, 4), 5.0), torch.tensor([0, 1]))  # every norm is 10
        >>> loss_fn.norm_mean  # was 20; the momentum is 0.01
        tensor([19.9000], dtype=torch.float64)
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.angle(0.0),
        "concentration": settings.number(0.0, open_low=True),
        "momentum": settings.number(0.0, 1.0),
    }
    NORMS = (0.001, 100.0)
    RUNNING_BUFFERS = ("norm_mean", "norm_std")
    margin: float
    concentration: float
    momentum: float
    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float | Tensor | None = 64.0,
        concentration: float = 0.333,
        momentum: float = 0.01,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin, self.concentration, self.momentum = margin, concentration, momentum
        self.register_buffer("norm_mean", running_value(self, 20.0))
        self.register_buffer("norm_std", running_value(self, 100.0))

    @torch.no_grad()
    def statistics(self, norm: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The running statistics after this batch, without ignored samples and norms that are not finite."""
        valid = (labels.long() != self.ignore_index) & norm.isfinite()
        count = self.all_reduce(valid.sum())
        mean = self.all_reduce(torch.where(valid, norm, 0.0).sum()) / count
        variance = self.all_reduce(torch.where(valid, (norm - mean) ** 2, 0.0).sum()) / (count - 1)
        new = (mean.nan_to_num(), variance.nan_to_num().sqrt())
        norm_mean, norm_std = (
            torch.where(count > 1, old + self.momentum * (n - old), old)  # one sample has no standard deviation
            for old, n in zip((self.norm_mean, self.norm_std), new, strict=True)
        )
        return norm_mean, norm_std

    @torch.no_grad()
    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        norm = embedding_norm(embeddings, *self.NORMS)
        mean, std = self.statistics(norm, labels) if self.training else (self.norm_mean, self.norm_std)
        z = ((norm - mean) / (std + 1e-3) * self.concentration).nan_to_num().clamp(-1.0, 1.0)
        theta = torch.acos(target_cosine(self, embeddings, labels)).nan_to_num()
        angle = torch.minimum(torch.maximum(-self.margin * z, -theta), torch.pi - theta)
        return Margin(m2=angle, m3=self.margin + self.margin * z, **self.margin_options)

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        if self.training:  # after the loss, so that a call that raises changes nothing
            mean, std = self.statistics(embedding_norm(embeddings.detach(), *self.NORMS), labels)
            self.update_state("norm_mean", mean)
            self.update_state("norm_std", std)
        return loss

    def margin_repr(self) -> list[str]:
        return [f"margin={self.margin}", f"concentration={self.concentration}"]


class MagFaceLoss(MarginLoss):
    """MagFace: the angular margin grows with the norm of the embedding, and a regularizer rewards large norms.

    With a, the norm clamped to ``norms = (l_a, u_a)``, the margin increases linearly from ``margins[0]`` at l_a to
    ``margins[1]`` at u_a, and ``norm_weight * (1 / a + a / u_a^2)`` is added to the loss of every sample
    (arXiv:2103.06627, eq. 2 and 4). The margin is differentiable in the norm.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margins: smallest and largest angle, in radians.
        norms: range of norms in which the margin increases.
        norm_weight: lambda_g of the paper.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.MagFaceLoss(num_classes=10, embedding_size=2)
        >>> embeddings = torch.tensor([[10.0, 0.0], [60.0, 0.0], [110.0, 0.0]])
        >>> loss_fn.current_margin(embeddings, torch.tensor([0, 1, 2])).m2  # radians
        tensor([0.4500, 0.6250, 0.8000], dtype=torch.float64)
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margins": settings.angles,
        "norms": settings.norms,
        "norm_weight": settings.number(0.0),
    }
    margins: tuple[float, float]
    norms: tuple[float, float]
    norm_weight: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margins: tuple[float, float] = (0.45, 0.8),
        norms: tuple[float, float] = (10.0, 110.0),
        norm_weight: float = 35.0,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margins, self.norms, self.norm_weight = margins, norms, norm_weight

    def setting_changed(self, name: str) -> None:
        super().setting_changed(name)
        if name == "margins":  # numbers are variables under torch.compile, but a tuple is a constant
            self.smallest_margin, self.largest_margin = self.margins

    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        low, high = self.smallest_margin, self.largest_margin
        shortest, longest = self.norms
        # A NaN embedding makes the loss NaN by its cosines, so the margin need not be NaN.
        norm = embedding_norm(embeddings, shortest, longest).nan_to_num(shortest)
        return Margin(m2=low + (high - low) * (norm - shortest) / (longest - shortest), **self.margin_options)

    def margin_repr(self) -> list[str]:
        return [f"margins={self.margins}", f"norms={self.norms}", f"norm_weight={self.norm_weight}"]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        norm = embedding_norm(embeddings, *self.norms)
        valid = labels.long() != self.ignore_index
        penalty = torch.where(valid, 1 / norm + norm / self.norms[1] ** 2, 0.0)
        if self.reduction == "mean":
            penalty = mean_over(self.all_reduce(penalty.sum()), self.all_reduce(valid.sum()))
        elif self.reduction == "sum":
            penalty = self.all_reduce(penalty.sum())
        return loss + (self.norm_weight * penalty).to(loss.dtype)


class ElasticFaceLoss(MarginLoss):
    """ElasticFace: each sample's margin is drawn from a normal distribution.

    See arXiv:2109.09416, eq. 5 and 6. In evaluation mode the margin is the mean.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: mean of the margin: an angle in radians, or a cosine.
        std: standard deviation of the margin.
        kind: ``"arc"`` adds the margin to the angle, ``"cos"`` subtracts it from the cosine.
        by_difficulty: ElasticFace+ of the paper: the drawn margins are sorted, so that samples farther from their class
            get larger margins.
        scale: s, the factor on the cosines; see :class:`fused_margin.MarginLoss`.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.ElasticFaceLoss(num_classes=10, embedding_size=4, margin=0.5, std=0.05)
        >>> embeddings, labels = torch.randn(2, 4), torch.tensor([3, 7])
        >>> loss_fn.current_margin(embeddings, labels).m2.shape  # one margin per sample
        torch.Size([2])
        >>> loss_fn.eval().current_margin(embeddings, labels).m2
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.number(0.0),
        "std": settings.number(0.0),
        "kind": settings.one_of("arc", "cos"),
        "by_difficulty": settings.boolean,
    }
    margin: float
    std: float
    kind: str
    by_difficulty: bool

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        std: float = 0.05,
        kind: str = "arc",
        by_difficulty: bool = False,
        scale: float | Tensor | None = 64.0,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.kind, self.margin, self.std, self.by_difficulty = kind, margin, std, by_difficulty

    def store_setting(self, name: str, value: Any) -> None:
        if name in ("margin", "kind"):
            current = {**vars(self), name: value}
            if current["kind"] == "arc":
                warn_of_degrees("margin", current.get("margin", 0.0))
        super().store_setting(name, value)

    @torch.no_grad()
    def current_margin(self, embeddings: Tensor, labels: Tensor) -> Margin:
        # A product, because torch.compile makes a fill value a constant.
        margin = self.margin * torch.ones(len(labels), dtype=torch.float64, device=embeddings.device)
        if self.training:
            margin = margin + self.std * torch.randn_like(margin)
            if self.by_difficulty:
                easiest_first = target_cosine(self, embeddings, labels).argsort(descending=True)
                margin = torch.empty_like(margin).scatter(0, easiest_first, margin.sort().values)
        if self.kind == "arc":
            return Margin(m2=margin, **self.margin_options)
        return Margin(m3=margin, **self.margin_options)

    def margin_repr(self) -> list[str]:
        return [f"margin={self.margin}", f"std={self.std}", f"kind={self.kind!r}"]


class CurricularFaceLoss(RunningState, MarginLoss):
    """CurricularFace: ArcFace with weights of hard negatives that grow during training.

    A cosine to another class above ``cos(theta + margin)`` becomes ``cos * (t + cos)`` (arXiv:2004.00288, eq. 6), where
    t is the running mean of the target cosines (eq. 9).

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        margin: angle in radians.
        scale: s, the factor on the cosines: a number, or a 0-d tensor that is not learned.
        momentum: share of t that a batch replaces, before t is used, as in the published code.
        **options: see :class:`fused_margin.MarginLoss`.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``.

    Attributes:
        t: (1,) float64 buffer, the running mean. Every forward in training mode updates it.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.CurricularFaceLoss(num_classes=3, embedding_size=3)
        >>> _ = torch.nn.init.eye_(loss_fn.weight)
        >>> loss = loss_fn(torch.eye(3), torch.arange(3))  # every target cosine is 1
        >>> loss_fn.t  # was 0; the momentum is 0.01
        tensor([0.0100], dtype=torch.float64)
    """

    RUNNING_BUFFERS = ("t",)
    margin: float
    momentum: float
    t: Tensor

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.angle(0.0),
        "momentum": settings.number(0.0, 1.0),
    }
    NUMBERS: ClassVar[dict[str, str]] = {"margin": "m2"}

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        momentum: float = 0.01,
        **options: Unpack[MarginOptions],
    ):
        super().__init__(num_classes, embedding_size, {}, scale, **options)
        self.margin, self.momentum = margin, momentum
        self.register_buffer("t", running_value(self, 0.0))

    def check_together(self, values: dict[str, Any]) -> None:
        super().check_together(values)
        _checks.absent("CurricularFace", label_smoothing=values.get("label_smoothing", 0.0))
        scale = values.get("scale", 64.0)
        if scale is None or (isinstance(scale, Tensor) and scale.requires_grad):
            raise TypeError(
                "scale: expected a number with CurricularFace, or a 0-d tensor without gradient, got "
                f"{'None' if scale is None else 'a learned scale'}"
            )

    @torch.no_grad()
    def next_t(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """t after this batch of target cosines (N,), without ignored samples."""
        valid = (labels.long() != self.ignore_index) & cosine.isfinite()
        count = self.all_reduce(valid.sum())
        mean = self.all_reduce(torch.where(valid, cosine, 0.0).sum()) / count
        momentum = self.momentum if self.training else 0.0
        return torch.where(count > 0, torch.lerp(self.t, mean, momentum * torch.ones_like(self.t)), self.t)

    @torch.no_grad()
    def hard_negatives(self, embeddings: Tensor, labels: Tensor) -> HardNegatives:
        cosine = target_cosine(self, embeddings, labels)
        threshold = psi(cosine, self.margin_function)
        return HardNegatives(threshold, self.next_t(cosine, labels))

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = super().forward(embeddings, labels)
        if self.training:  # after the loss, so that a call that raises changes nothing
            self.update_state("t", self.next_t(target_cosine(self, embeddings, labels), labels))
        return loss


def running_value(loss_fn: MarginLoss, start: float) -> Tensor:
    """A number that is updated in place, as a (1,) tensor: torch.compile loses writes to a 0-d float64 tensor."""
    return torch.full((1,), start, dtype=torch.float64, device=loss_fn.weight.device)


def embedding_norm(embeddings: Tensor, smallest: float, largest: float) -> Tensor:
    """Norms (N,) float64 of embeddings (N, D), clamped to [smallest, largest]."""
    return torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float64).clamp(smallest, largest)


def target_cosine(loss_fn: MarginLoss, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Target cosines (N,) float64. The values of ignored samples are undefined."""
    shard = loss_fn.shard
    if shard is not None:
        return divided_target_cosines(
            embeddings, loss_fn.weight, labels, loss_fn.sub_centers, loss_fn.ignore_index, shard.name, shard.num_classes
        )
    return target_cosines(embeddings, loss_fn.weight, labels.long(), loss_fn.sub_centers)

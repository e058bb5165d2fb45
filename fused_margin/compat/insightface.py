"""The margins, PartialFC_V2 and checkpoints of InsightFace's recognition/arcface_torch, computed by the fused kernels.

Constructors, attributes, gradients and files are InsightFace's. The (N, C) logits are never stored as a whole.
Intended differences:

- Without torch.distributed there is one rank. Batch sizes may differ between ranks and between steps.
- The reported loss is not capped; InsightFace's is at most -log(1e-30) = 69.0776.
- ``CombinedMarginLoss`` applies m1, m2 and m3 together; InsightFace's ignores m1 and m2 if m3 > 0.
- ``PartialFC_V2`` accepts only the margins of this module.
- A label that is not a class is an error, and -100 excludes a sample.
- A checkpoint can be loaded on a different number of ranks.
"""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_margin import _checks
from fused_margin._cross_entropy import margin_cross_entropy
from fused_margin._ops.row_update import WeightStepper
from fused_margin.compat.insightface_checkpoints import Progress, load_checkpoint, save_checkpoint
from fused_margin.distributed import Shard
from fused_margin.losses import settings
from fused_margin.margins import FilteredNegatives, Margin, psi

__all__ = [
    "ArcFace",
    "CombinedMarginLoss",
    "CosFace",
    "LogitMargin",
    "PartialFC_V2",
    "Progress",
    "load_checkpoint",
    "save_checkpoint",
]

OTHER_RANK = -1  # label of a sample whose class another rank has


class MarginNumbers(TypedDict, total=False):
    """The numbers of a :class:`fused_margin.Margin` that a margin of InsightFace sets."""

    m1: float
    m2: float
    m3: float


class LogitMargin(settings.Settings):
    """The base class of the margins on cosines, which are the ``margin_loss`` of :class:`PartialFC_V2`.

    Their arguments are attributes that may change between steps.

    Examples:
        >>> from fused_margin.compat import insightface
        >>> isinstance(insightface.ArcFace(), insightface.LogitMargin)
        True
    """

    SETTINGS: ClassVar = {
        "s": settings.number(0.0, open_low=True),
        "interclass_filtering_threshold": settings.number(0.0),
    }
    s: float
    interclass_filtering_threshold: float = 0
    s_was_changed = False  # after the constructor

    def store_setting(self, name: str, value: float) -> None:
        self.s_was_changed = self.s_was_changed or (name == "s" and "s" in self.__dict__)
        super().store_setting(name, value)

    def numbers(self) -> MarginNumbers:
        """m1, m2 and m3."""
        raise NotImplementedError

    def fused(self) -> Margin:
        """The margin for the fused loss. As in InsightFace, psi is cos(phi) - m3 also beyond pi, and dpsi / dcos is 1."""
        return Margin(**self.numbers(), beyond_pi="none", gradient="straight_through")

    def scale(self, device: torch.device) -> float | Tensor:
        """s for the fused loss."""
        if torch.compiler.is_compiling() and self.s_was_changed:
            # A number would be a constant of the graph, which would be compiled again for every value.
            return torch.ones((), dtype=torch.float64, device=device) * self.s
        return self.s

    def filtered(self) -> FilteredNegatives | None:
        """The filter of near classes for the fused loss; None without a threshold."""
        threshold = self.interclass_filtering_threshold
        return FilteredNegatives(min(threshold, 1.0)) if threshold > 0 else None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scaled logits with the margin on each sample's own class. The input is not changed.

        Args:
            logits: (N, C) cosines.
            labels: (N,) or (N, 1) integers in [0, C), or -1 for a sample of another rank's class.

        Returns:
            (N, C). The gradient is that of ``s * logits``, and 0 for filtered logits.

        Raises:
            ValueError, TypeError: labels have a wrong shape or dtype or, on the CPU, a wrong value.
        """
        labels = column(labels)
        _checks.per_sample_index("labels", labels, logits)
        _checks.label_values(labels, logits.shape[1], OTHER_RANK)
        rows = (labels != OTHER_RANK).nonzero().squeeze(1)
        own = rows, labels[rows].long()
        target = psi(logits[own], self.fused())
        if self.interclass_filtering_threshold > 0:
            logits = torch.where(logits > self.interclass_filtering_threshold, 0.0, logits)
        return logits.index_put(own, target) * self.s


class CombinedMarginLoss(LogitMargin):
    """InsightFace's combined margin: a factor on the angle, an angle and a cosine.

    ``psi(theta) = cos(m1 * theta + m2) - m3`` (arXiv:1801.07698, eq. 4).

    Args:
        s: scale of the logits.
        m1: factor on the angle.
        m2: angle in radians.
        m3: cosine.
        interclass_filtering_threshold: cosines of other classes above it are replaced by 0. 0 disables it.

    Raises:
        ValueError, TypeError: a number is out of range.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import insightface
        >>> margin_loss = insightface.CombinedMarginLoss(s=4.0, m1=1.0, m2=0.5, m3=0.0)
        >>> margin_loss(torch.eye(2), torch.tensor([0, 1]))  # 4 cos(0.5) on each sample's own class
        tensor([[3.5103, 0.0000],
                [0.0000, 3.5103]])
    """

    SETTINGS: ClassVar = dict.fromkeys(("m1", "m2", "m3"), settings.margin_number)

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0):
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        if m3 > 0 and (m1 != 1 or m2 != 0):
            warnings.warn(
                f"m1={m1}, m2={m2} and m3={m3} are applied together; insightface applies m3 alone, "
                "which is m1=1, m2=0 here",
                stacklevel=2,
            )

    def numbers(self) -> MarginNumbers:
        return {"m1": self.m1, "m2": self.m2, "m3": self.m3}


class ArcFace(LogitMargin):
    """InsightFace's ArcFace: an additive angular margin.

    ``psi(theta) = cos(theta + margin)`` (arXiv:1801.07698, eq. 3).

    Args:
        s: scale of the logits.
        margin: angle in radians.

    Raises:
        ValueError, TypeError: a number is out of range.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import insightface
        >>> insightface.ArcFace(s=4.0, margin=0.5)(torch.eye(2), torch.tensor([0, 1]))  # 4 cos(0.5)
        tensor([[3.5103, 0.0000],
                [0.0000, 3.5103]])
    """

    SETTINGS: ClassVar = {"margin": settings.angle(-math.inf)}

    def __init__(self, s: float = 64.0, margin: float = 0.5):
        super().__init__()
        self.s, self.margin = s, margin

    def numbers(self) -> MarginNumbers:
        return {"m2": self.margin}


class CosFace(LogitMargin):
    """InsightFace's CosFace: an additive cosine margin.

    ``psi(theta) = cos(theta) - m`` (arXiv:1801.09414, eq. 4).

    Args:
        s: scale of the logits.
        m: cosine.

    Raises:
        ValueError, TypeError: a number is out of range.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import insightface
        >>> insightface.CosFace(s=4.0, m=0.4)(torch.eye(2), torch.tensor([0, 1]))  # 4 (1 - 0.4)
        tensor([[2.4000, 0.0000],
                [0.0000, 2.4000]])
    """

    SETTINGS: ClassVar = {"m": settings.number(-math.inf)}

    def __init__(self, s: float = 64.0, m: float = 0.40):
        super().__init__()
        self.s, self.m = s, m

    def numbers(self) -> MarginNumbers:
        return {"m3": self.m}


def checked_margin(name: str, value: LogitMargin) -> LogitMargin:
    """Raise TypeError for other modules than the margins here, because PartialFC_V2 does not call their forward."""
    if not isinstance(value, LogitMargin) or type(value).forward is not LogitMargin.forward:
        raise TypeError(
            f"{name}: expected CombinedMarginLoss, ArcFace or CosFace of fused_margin.compat.insightface, got "
            f"{type(value).__module__}.{type(value).__qualname__}"
        )
    return value


class PartialFC_V2(settings.Settings):
    """Partial FC: margin softmax over classes that are divided among ranks.

    See arXiv:2203.15565. Every step can use a random share of the classes. Every rank calls it with its own samples, of
    any number; without torch.distributed there is one rank. The loss is the mean over the samples of all ranks. The
    embeddings' gradient is multiplied by the number of ranks, because DistributedDataParallel divides the backbone's
    gradient by it.

    Args:
        margin_loss: CombinedMarginLoss, ArcFace or CosFace of this module.
        embedding_size: length of an embedding, D.
        num_classes: C, over all ranks.
        sample_rate: share of its classes that a rank uses in a step: the classes of the samples, and others that
            torch's generator draws. As in InsightFace, evaluation mode draws too.
        fp16: multiply in half precision; kernels that do not support it use float32. If False, autocast has no effect.
        process_group: the ranks; by default torch.distributed's default group, if there is one.
        sparse: with a sample_rate below 1, whether the gradient of ``weight`` is sparse, as that of
            ``torch.nn.Embedding``. A dense gradient, as InsightFace's, suits every optimizer, and weight decay and
            momentum then change all classes. :class:`fused_margin.optim.ProjectedSGD` (with ``project=False``, to step
            as torch.optim.SGD) accepts a sparse gradient, and updates the drawn classes and their momentum only.
        workspace_mb: bound on scratch memory in MiB, for any C.

    Shape:
        local_embeddings (N, D), local_labels (N,) or (N, 1) integers over all classes -> scalar.

    Attributes:
        weight: (num_local, D) parameter of this rank's classes, initialized N(0, 0.01).
        rank: rank of this process.
        world_size: number of ranks.
        class_start: first class of this rank.
        num_local: number of classes of this rank.
        num_sample: number of its classes that are used in a step.
        margin_softmax: ``margin_loss``. It, its arguments, ``sample_rate``, ``fp16``, ``sparse`` and ``workspace_mb``
            may change between steps. torch.compile compiles once more for the second value of an argument of
            margin_softmax, and not for further values.

    Raises:
        ValueError, TypeError: an argument is not valid; the message has its name, the expected and the actual value.

    Examples:
        >>> import torch
        >>> from fused_margin.compat import insightface
        >>> margin_loss = insightface.ArcFace(s=4.0)
        >>> partial_fc = insightface.PartialFC_V2(margin_loss, embedding_size=3, num_classes=3)
        >>> _ = torch.nn.init.eye_(partial_fc.weight)
        >>> round(partial_fc(torch.eye(3), torch.arange(3)).item(), 4)  # log(1 + 2 exp(-4 cos(0.5)))
        0.0581
    """

    SETTINGS: ClassVar = {
        "sample_rate": settings.number(0.0, 1.0, open_low=True),
        "fp16": settings.boolean,
        "sparse": settings.boolean,
        "workspace_mb": settings.WORKSPACE_MB,
        "margin_softmax": checked_margin,
    }
    stepper: WeightStepper | None = None  # set by fused_margin.optim.step_in_backward
    FIXED = (
        "num_classes", "embedding_size", "rank", "world_size", "class_start", "num_local", "num_sample", "process_group",
    )  # fmt: skip

    def __init__(
        self,
        margin_loss: LogitMargin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        process_group: dist.ProcessGroup | None = None,
        sparse: bool = False,
        workspace_mb: float = 256,
    ):
        super().__init__()
        checked_margin("margin_loss", margin_loss)
        self.num_classes = _checks.positive_index("num_classes", num_classes)
        self.embedding_size = _checks.positive_index("embedding_size", embedding_size)
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        shard = Shard(self.num_classes, process_group)
        self.shard = shard if shard.world_size > 1 else None
        self.rank, self.world_size = shard.rank, shard.world_size
        self.class_start, self.num_local = shard.begin, shard.size
        self.sample_rate, self.fp16, self.sparse, self.workspace_mb = sample_rate, fp16, sparse, workspace_mb
        self.margin_softmax = margin_loss
        self.weight = nn.Parameter(torch.normal(0, 0.01, (self.num_local, self.embedding_size)))

    @property
    def num_sample(self) -> int:
        """Number of classes of this rank that are used in a step."""
        return int(self.sample_rate * self.num_local)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.shard is None else self.shard.group

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """The mean loss of the samples of all ranks.

        Args:
            local_embeddings: (N, D) of this rank's samples.
            local_labels: (N,) or (N, 1) integers in [0, C), or -100 to exclude a sample.

        Returns:
            Scalar, the same on all ranks.
        """
        embeddings, weight = local_embeddings, self.weight
        if self.world_size > 1 and embeddings.requires_grad:
            embeddings = embeddings.view_as(embeddings)  # the caller's tensor gets no hook
            embeddings.register_hook(lambda gradient: gradient * self.world_size)
        labels = column(local_labels)
        _checks.batch(embeddings, weight, labels, at_least=1 if self.shard is None else 0)
        _checks.shard(self.shard, weight, 1, 0.0)
        with torch.autocast(weight.device.type, torch.float16, enabled=bool(self.fp16)):
            return margin_cross_entropy(
                embeddings,
                weight,
                labels,
                self.margin_softmax.fused(),
                self.margin_softmax.scale(weight.device),
                exclusive_weight=0.0,
                class_weight=None,
                reduction="mean",
                ignore_index=-100,
                label_smoothing=0.0,
                sub_centers=1,
                hard_negatives=self.margin_softmax.filtered(),
                nearest=None,
                shard=self.shard,
                sample_rate=self.sample_rate,
                sparse=self.sparse,
                workspace_mb=self.workspace_mb,
                stepper=self.stepper if self.stepper is not None and self.stepper.parameter is weight else None,
            )

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, sample_rate={self.sample_rate}, "
            f"fp16={self.fp16}, rank={self.rank}, world_size={self.world_size}"
        )


def column(labels: Tensor) -> Tensor:
    """Labels (N,) from (N,) or (N, 1)."""
    is_column = isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == 1
    return labels.squeeze(1) if is_column else labels

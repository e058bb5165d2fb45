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

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2", "Progress", "load_checkpoint", "save_checkpoint"]

OTHER_RANK = -1  # label of a sample whose class another rank has


class MarginNumbers(TypedDict, total=False):
    """The numbers of a :class:`fused_margin.Margin` that a margin of InsightFace sets."""

    m1: float
    m2: float
    m3: float


class LogitMargin(settings.Settings):
    """A margin on cosines, the ``margin_loss`` of PartialFC_V2. Its settings may change between steps."""

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
    """All three margins, ``psi = cos(m1 * theta + m2) - m3`` (arXiv:1801.07698, eq. 4).

    Args:
        s: scale of the logits.
        m1: factor on the angle.
        m2: angle in radians.
        m3: cosine.
        interclass_filtering_threshold: cosines of other classes above it are replaced by 0. 0 disables it.

    Raises:
        ValueError, TypeError: a number is out of range.
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
    """ArcFace, ``psi = cos(theta + margin)`` (arXiv:1801.07698, eq. 3).

    Args:
        s: scale of the logits.
        margin: angle in radians.

    Raises:
        ValueError, TypeError: a number is out of range.
    """

    SETTINGS: ClassVar = {"margin": settings.angle(-math.inf)}

    def __init__(self, s: float = 64.0, margin: float = 0.5):
        super().__init__()
        self.s, self.margin = s, margin

    def numbers(self) -> MarginNumbers:
        return {"m2": self.margin}


class CosFace(LogitMargin):
    """CosFace, ``psi = cos(theta) - m`` (arXiv:1801.09414, eq. 4).

    Args:
        s: scale of the logits.
        m: cosine.

    Raises:
        ValueError, TypeError: a number is out of range.
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
    """Margin softmax over classes that are divided among ranks (Partial FC, arXiv:2203.15565).

    Every step can use a random share of the classes. Every rank calls it with its own samples, of any number; without
    torch.distributed there is one rank. The loss is the mean over the samples of all ranks. The embeddings' gradient is
    multiplied by the number of ranks, because DistributedDataParallel divides the backbone's gradient by it.

    Args:
        margin_loss: CombinedMarginLoss, ArcFace or CosFace of this module.
        embedding_size: D.
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
        weight: (num_local, D) parameter of this rank's classes, the first of which is class_start. Initialised with
            N(0, 0.01).
        rank, world_size, class_start, num_local, num_sample, margin_softmax, and the arguments. margin_softmax and its
            settings, sample_rate, fp16, sparse and workspace_mb may change between steps. torch.compile compiles once
            more for the second value of a setting of margin_softmax, and not for further values.

    Raises:
        ValueError, TypeError: an argument is not valid; the message has its name, the expected and the actual value.
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
        return int(self.sample_rate * self.num_local)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.shard is None else self.shard.group

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
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

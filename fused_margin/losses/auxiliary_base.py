"""The base class of the auxiliary losses: ignored samples, the reduction, and samples and classes of several ranks."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fused_margin import _checks
from fused_margin._cross_entropy import mean_over
from fused_margin._ops.collectives import all_reduce_forward
from fused_margin._ops.divided_samples import GatheredLabels, gather_own_samples
from fused_margin.distributed import Shard
from fused_margin.losses import settings


class ClassSamples(NamedTuple):
    """The samples (S, D) whose class this rank has. Without a process group, all samples."""

    embeddings: Tensor  # (S, D)
    classes: Tensor  # (S,) int64, of the classes of this rank
    valid: Tensor  # (S,) whether a sample is not ignored
    positions: Tensor | None  # (S,) int64 among the samples of all ranks; None without a process group
    gathered: GatheredLabels | None


class AuxiliaryLoss(settings.Settings):
    """Base class of the auxiliary losses: ignored samples and the reduction. Arguments may be set between steps.

    Args:
        num_classes: number of classes of all ranks, of a loss that has rows of classes.

    Attributes:
        shard: a :class:`fused_margin.distributed.Shard` of ``process_group``, or None.
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "reduction": settings.REDUCTION,
        "ignore_index": settings.integer,
        "workspace_mb": settings.WORKSPACE_MB,
    }
    FIXED: ClassVar[tuple[str, ...]] = ("process_group",)
    reduction: str
    ignore_index: int
    workspace_mb: float
    shard: Shard | None = None  # a pickle of version 0.1 has none

    def __init__(
        self, reduction: str, ignore_index: int, process_group: dist.ProcessGroup | None = None, num_classes: int = 1
    ):
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"process_group: expected a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}"
            )
        self.shard = None if process_group is None else Shard(num_classes, process_group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks have the samples and the classes, or None."""
        return None if self.shard is None else self.shard.group

    def class_buffers(self) -> dict[str, Tensor]:
        """Buffers with a row per class. With a process group, those of this rank."""
        return {}

    def sharded_state_dict(self) -> dict[str, Tensor]:
        """The state of all ranks, for ``torch.distributed.checkpoint``, as of :class:`fused_margin.MarginLoss`.

        Returns:
            Tensors by name. With a process group, the buffers with a row per class are ShardedTensors.
        """
        state = self.state_dict()
        if self.shard is not None:
            state |= {name: self.shard.sharded_tensor(state[name]) for name in self.class_buffers()}
        return state

    def classes(self, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """int64 labels (N,) with 0 for ignored samples, and flags (N,) of the samples that are not ignored."""
        labels = labels.to(torch.int64)
        _checks.label_values(labels, num_classes, self.ignore_index)
        valid = labels != self.ignore_index
        return labels.masked_fill(~valid, 0), valid

    def at_classes(self, embeddings: Tensor, labels: Tensor, num_rows: int, shard: Shard | None) -> ClassSamples:
        """The samples of all ranks whose class this rank has; differentiable.

        Args:
            embeddings: (N, D) of this rank.
            labels: (N,) of this rank.
            num_rows: number of classes of this rank.
            shard: of the classes; None without a process group.
        """
        if shard is None:
            return ClassSamples(embeddings, *self.classes(labels, num_rows), None, None)
        own, positions, gathered = gather_own_samples(embeddings, labels.to(torch.int64), shard, self.ignore_index)
        classes = gathered.labels[positions] - shard.begin
        return ClassSamples(own, classes, torch.ones_like(classes, dtype=torch.bool), positions, gathered)

    def reduce_samples(self, values: Tensor, samples: ClassSamples, labels: Tensor) -> Tensor:
        """The reduction of values (S,) of the samples of `at_classes`, of which this rank passed `labels`."""
        if samples.gathered is None or samples.positions is None:
            return self.reduce(values, samples.valid)
        valid = labels.to(torch.int64) != self.ignore_index
        return self.reduce(samples.gathered.to_ranks(values, samples.positions), valid)

    def over_ranks(self, value: Tensor) -> Tensor:
        """The sum over ranks of a value of this rank's samples, each of which differentiates its own."""
        return value if self.shard is None else all_reduce_forward(value, self.shard.name)

    def reduce(self, values: Tensor, valid: Tensor) -> Tensor:
        """The reduction of values (N,) over the samples that are not ignored, of all ranks."""
        values = values.masked_fill(~valid, 0.0)
        if self.reduction == "none":
            return values
        total, count = values.sum(), valid.sum()
        if self.shard is not None:
            total, count = self.over_ranks(torch.stack([total.double(), count.double()])).unbind()
        return (mean_over(total, count) if self.reduction == "mean" else total).to(values.dtype)

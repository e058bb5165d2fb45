"""Auxiliary losses, to be added to a margin loss: ring, intra, inter and uniform loss; center loss is in center.py."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.class_pair_sums import other_class_sums
from fused_margin._ops.collectives import all_reduce_backward, scatter_rows
from fused_margin._ops.divided_pair_sums import divided_pair_sums
from fused_margin._ops.divided_samples import class_shard, gather_labels, target_class_sums
from fused_margin._ops.inputs import MIB, compute_dtype
from fused_margin._ops.normalization import unit_rows
from fused_margin._ops.row_update import refuse_stepped
from fused_margin.distributed import Shard
from fused_margin.losses import settings
from fused_margin.losses.auxiliary_base import AuxiliaryLoss
from fused_margin.losses.center import CenterLoss
from fused_margin.losses.running_state import RunningState, once_per_step

# Version 0.1 had all auxiliary losses in this module, and its pickles name it.
__all__ = ["AuxiliaryLoss", "CenterLoss", "InterLoss", "IntraLoss", "RingLoss", "UniformLoss"]


class RingLoss(RunningState, AuxiliaryLoss):
    """Ring loss: pulls the norms of embeddings towards a learned radius.

    ``loss_i = (|x_i| - radius)^2 / 2`` (Zheng et al., CVPR 2018, arXiv:1803.00130, eq. 2). Multiply it by the paper's
    lambda when adding it to another loss.

    Args:
        radius: initial radius. None uses the mean norm of the first batch in training mode, as in the published code.
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        process_group: group whose ranks have different samples. Every rank gets the loss of the samples of all ranks (its
            own losses with ``reduction="none"``), and ``radius`` the same value and gradient on every rank. Default: None.
        device: device of ``radius``.
        dtype: dtype of ``radius``.

    Shape:
        embeddings (N, D), labels (N,) or None -> scalar, or (N,) with ``reduction="none"``; float64 if an input is,
        else float32. Labels only determine which samples are ignored.

    Attributes:
        radius: scalar parameter.
        initialised: buffer, whether ``radius`` has its initial value. Until then the mean norm of the batch is used.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> ring_loss = fused_margin.RingLoss(radius=3.0)
        >>> ring_loss(torch.tensor([[3.0, 4.0]])).item()  # (5 - 3)^2 / 2
        2.0
    """

    RUNNING_BUFFERS = ("initialised",)
    radius: nn.Parameter
    initialised: Tensor
    LABELS_OPTIONAL = True

    def __init__(
        self,
        radius: float | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(reduction, ignore_index, process_group)
        if radius is not None:
            _checks.number("radius", radius, 0.0)
        self.radius = nn.Parameter(torch.tensor(float(radius or 0.0), device=device, dtype=dtype))
        self.register_buffer("initialised", torch.tensor(radius is not None, device=device))

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings (N, D). Labels (N,), if given, determine which samples are ignored."""
        _checks.matrix("embeddings", embeddings, "(N, embedding_size)")
        _checks.same_device("embeddings", embeddings, self.radius)
        norm = torch.linalg.vector_norm(embeddings, dim=1, dtype=compute_dtype(embeddings, self.radius))
        valid = torch.ones_like(norm, dtype=torch.bool)
        if labels is not None:
            _checks.per_sample_index("labels", labels, embeddings)
            valid = labels.to(torch.int64) != self.ignore_index
        mean = self.mean_norm(norm, valid)
        # The derivative by the radius is 0 at the mean norm, so the first batch's gradient of 0 is exact.
        radius = self.radius if self.shard is None else all_reduce_backward(self.radius, self.shard.name)
        loss = self.reduce((norm - radius.where(self.initialised.clone(), mean.nan_to_num())).square() / 2, valid)
        if self.training:  # after the loss, so that a call that raises changes nothing
            self.initialise(mean)
        return loss

    @torch.no_grad()
    def mean_norm(self, norm: Tensor, valid: Tensor) -> Tensor:
        """Mean of the finite norms of samples that are not ignored, of all ranks; NaN if there is none."""
        valid = valid & norm.isfinite()
        total, count = norm.masked_fill(~valid, 0.0).sum(), valid.sum()
        if self.shard is not None:
            total, count = self.over_ranks(torch.stack([total.double(), count.double()])).unbind()
        return (total / count).to(norm.dtype)

    @torch.no_grad()
    def initialise(self, radius: Tensor) -> None:
        """Sets the radius, if it has no initial value and the given one is finite."""
        is_first = ~self.initialised & radius.isfinite()
        self.radius.copy_(radius.where(is_first, self.radius))
        self.update_state("initialised", self.initialised | is_first)


class IntraLoss(AuxiliaryLoss):
    """Intra-loss: the angle of an embedding to the weight of its class, divided by pi.

    ``loss_i = theta_{y_i} / pi`` (ArcFace, arXiv:1801.07698, eq. 5). The gradient is exact. It is 0 where theta is 0 or
    pi, where no derivative exists.

    Args:
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        process_group: group whose ranks have different samples and classes: ``weight`` is this rank's slice of the class
            weights, as in :class:`fused_margin.MarginLoss`. Every rank gets the loss of the samples of all ranks (its own
            losses with ``reduction="none"``) and the gradients of that loss. Default: None.

    Shape:
        embeddings (N, D), weight (C, D), labels (N,) -> scalar, or (N,) with ``reduction="none"``; float64 if an input
        is, else float32.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> embeddings, weight, labels = torch.tensor([[0.0, 3.0]]), torch.eye(2), torch.tensor([0])
        >>> fused_margin.IntraLoss()(embeddings, weight, labels).item()  # 90 degrees
        0.5
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(reduction, ignore_index, process_group)

    def forward(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,), by class weights (C, D)."""
        _checks.batch(embeddings, weight, labels, at_least=1 if self.shard is None else 0)
        refuse_stepped(weight)
        shard = None if self.shard is None else class_shard(weight, self.shard)
        samples = self.at_classes(embeddings, labels, len(weight), shard)
        dtype = compute_dtype(embeddings, weight)
        # Converted first, so that gradients of one class are added in this dtype.
        target = unit_rows(F.embedding(samples.classes, weight.to(dtype)), dtype)[0]
        sample = unit_rows(samples.embeddings, dtype)[0]
        # The ratio of the rhombus's diagonals is the tangent of half the angle. arccos would be inaccurate near 0.
        across, along = (torch.linalg.vector_norm(diagonal, dim=1) for diagonal in (sample - target, sample + target))
        return self.reduce_samples(2.0 / math.pi * torch.atan2(across, along), samples, labels)


class InterLoss(AuxiliaryLoss):
    """Inter-loss: minus the mean angle of the weight of a sample's class to the others, divided by pi.

    ``loss_i = -1 / (pi (C - 1)) * sum_{j != y_i} arccos(w_{y_i} . w_j)`` with unit-length class weights (ArcFace,
    arXiv:1801.07698, eq. 6). A class counts once per sample of the batch. The (N, C) cosines are computed in tiles. In
    the gradient sin(theta) is bounded below by the square root of the dtype's epsilon.

    Args:
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        process_group: group whose ranks have different samples and classes, as in :class:`fused_margin.IntraLoss`.
        workspace_mb: bound on scratch memory in MiB, for any C.

    Shape:
        weight (C, D), C >= 2, labels (N,) -> scalar, or (N,) with ``reduction="none"``; float64 if ``weight`` is, else
        float32.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> weight = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])  # at an angle of pi
        >>> round(fused_margin.InterLoss()(weight, torch.tensor([0])).item(), 4)
        -1.0
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        workspace_mb: float = 256,
    ):
        super().__init__(reduction, ignore_index, process_group)
        self.workspace_mb = workspace_mb

    def forward(self, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss of class weights (C, D), of which the classes in labels (N,) count."""
        _checks.class_weights(weight, at_least=2 if self.shard is None else 0)
        _checks.labels(labels, weight)
        refuse_stepped(weight)
        if self.shard is not None:
            return self.divided(weight, labels, class_shard(weight, self.shard, at_least=2))
        classes, valid = self.classes(labels, len(weight))
        weight = weight.to(compute_dtype(weight))
        rows = F.embedding(classes, weight)
        angles = other_class_sums(rows, weight, classes, "angle", workspace_mb=self.workspace_mb)
        return self.reduce(-angles / (math.pi * (len(weight) - 1)), valid).to(weight.dtype)

    def divided(self, weight: Tensor, labels: Tensor, shard: Shard) -> Tensor:
        """The loss of the samples of all ranks. Every rank adds the angles to its own classes."""
        weight = weight.to(compute_dtype(weight))
        labels = labels.to(torch.int64)
        gathered = gather_labels(labels, shard, self.ignore_index)
        classes, index = gathered.labels[gathered.counted].unique(return_inverse=True)
        sums, _ = target_class_sums(weight, classes, shard, "angle", int(self.workspace_mb * MIB))
        angles = gathered.to_ranks(sums[index], gathered.counted)
        values = -angles / (math.pi * (shard.num_classes - 1))
        return self.reduce(values, labels != self.ignore_index).to(weight.dtype)


class UniformLoss(AuxiliaryLoss):
    """UniformFace's uniform loss: the mean potential of the pairs of class weights.

    The mean is over all ordered pairs of classes, with unit-length class weights as class centers (Duan, Lu and Zhou,
    CVPR 2019)::

        loss = 1 / (C (C - 1)) * sum_i sum_{j != i} 1 / (1 + |w_i - w_j|)

    The (C, C) distances are computed in tiles. In the gradient a distance is bounded below by the square root of the dtype's
    epsilon.

    Args:
        batch_classes: i runs only over the classes of the batch, each once, and their number replaces C as a divisor.
        ignore_index: label of samples without a class.
        process_group: group whose ranks have different classes, and samples, as in :class:`fused_margin.IntraLoss`. The
            ranks exchange their class weights, of which at most two blocks of other ranks are resident; with
            ``batch_classes`` only those of the batch's classes.
        workspace_mb: bound on scratch memory in MiB, for any C.

    Shape:
        weight (C, D), C >= 2, labels (N,), needed only with ``batch_classes`` -> scalar; float64 if ``weight`` is, else
        float32.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> weight = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])  # unit-length rows have a distance of 2
        >>> round(fused_margin.UniformLoss()(weight).item(), 4)
        0.3333
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"batch_classes": settings.boolean}
    batch_classes: bool

    def __init__(
        self,
        *,
        batch_classes: bool = False,
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        workspace_mb: float = 256,
    ):
        super().__init__("mean", ignore_index, process_group)
        self.batch_classes, self.workspace_mb = batch_classes, workspace_mb

    def forward(self, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of class weights (C, D). Labels (N,) are needed with ``batch_classes``."""
        _checks.class_weights(weight, at_least=2 if self.shard is None else 0)
        refuse_stepped(weight)
        if self.shard is not None:
            return self.divided(weight, labels, class_shard(weight, self.shard, at_least=2))
        weight = weight.to(compute_dtype(weight))
        rows = classes = None
        valid = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        if self.batch_classes:
            labels = _checks.labels(labels, weight)
            ordered = labels.to(torch.int64).sort().values
            classes, valid = self.classes(ordered, len(weight))
            valid = valid & (ordered.diff(prepend=ordered[:1] - 1) != 0)
            rows = F.embedding(classes, weight)
        potentials = other_class_sums(rows, weight, classes, "potential", workspace_mb=self.workspace_mb)
        return self.reduce(potentials / (len(weight) - 1), valid).to(weight.dtype)

    def divided(self, weight: Tensor, labels: Tensor | None, shard: Shard) -> Tensor:
        """The loss of the classes of all ranks."""
        weight, workspace_bytes = weight.to(compute_dtype(weight)), int(self.workspace_mb * MIB)
        if self.batch_classes:
            labels = _checks.labels(labels, weight)
            gathered = gather_labels(labels.to(torch.int64), shard, self.ignore_index)
            classes = gathered.labels[gathered.counted].unique()
            sums, counts = target_class_sums(weight, classes, shard, "potential", workspace_bytes)
            potentials = scatter_rows(sums, counts, shard.name)
        else:
            potentials = divided_pair_sums(weight, "potential", workspace_bytes, shard.name, shard.num_classes)
        every = torch.ones_like(potentials, dtype=torch.bool)
        return self.reduce(potentials / (shard.num_classes - 1), every).to(weight.dtype)

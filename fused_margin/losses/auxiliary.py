"""Auxiliary losses, to be added to a margin loss: center, ring, intra, inter and uniform loss."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._cross_entropy import mean_over
from fused_margin._ops.class_pair_sums import other_class_sums
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.normalization import unit_rows
from fused_margin._ops.row_update import refuse_stepped
from fused_margin.losses import settings
from fused_margin.losses.running_state import RunningState, once_per_step


class AuxiliaryLoss(settings.Settings):
    """Base class of the auxiliary losses: ignored samples and the reduction. Arguments may be set between steps."""

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "reduction": settings.REDUCTION,
        "ignore_index": settings.integer,
        "workspace_mb": settings.WORKSPACE_MB,
    }
    reduction: str
    ignore_index: int
    workspace_mb: float

    def __init__(self, reduction: str, ignore_index: int):
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def classes(self, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """int64 labels (N,) with 0 for ignored samples, and flags (N,) of the samples that are not ignored."""
        labels = labels.to(torch.int64)
        _checks.label_values(labels, num_classes, self.ignore_index)
        valid = labels != self.ignore_index
        return labels.masked_fill(~valid, 0), valid

    def reduce(self, values: Tensor, valid: Tensor) -> Tensor:
        """The reduction of values (N,) over the samples that are not ignored."""
        values = values.masked_fill(~valid, 0.0)
        if self.reduction == "none":
            return values
        return mean_over(values.sum(), valid.sum()) if self.reduction == "mean" else values.sum()


class CenterLoss(RunningState, AuxiliaryLoss):
    """Center loss: half the squared distance of an embedding to the center of its class.

    Every forward in training mode moves the centers after computing its loss (Wen et al., ECCV 2016, eq. 2 and 4)::

        loss_i = |x_i - c_{y_i}|^2 / 2
        c_j   <- c_j - alpha * sum_{i: y_i = j} (c_j - x_i) / (1 + n_j)         n_j: samples of class j in the batch

    The paper sums over the batch; the default here is the mean. Embeddings are not normalized. The centers get no
    gradient. A sample with NaN does not move its center.

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        alpha: step size of the centers, in [0, 1].
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        device: device of ``centers``.
        dtype: dtype of ``centers``, float32 or float64. Half precision becomes float32, because it would round small
            moves to 0.

    Shape:
        embeddings (N, D), labels (N,) -> scalar, or (N,) with ``reduction="none"``; float64 if an input is, else float32.

    Attributes:
        centers: (C, D) buffer, initially 0.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> center_loss = fused_margin.CenterLoss(num_classes=10, embedding_size=2)
        >>> center_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([7])).item()  # the center was 0
        12.5
        >>> center_loss.centers[7]  # alpha / (1 + 1) = 0.25 of the way
        tensor([0.7500, 1.0000])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"alpha": settings.number(0.0, 1.0)}
    RUNNING_BUFFERS = ("centers",)
    MAX_PENDING = 8  # each has a state of (N, D)
    alpha: float
    centers: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 0.5,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(reduction, ignore_index)
        num_classes = _checks.positive_index("num_classes", num_classes)
        embedding_size = _checks.positive_index("embedding_size", embedding_size)
        self.alpha = alpha
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("centers", torch.zeros(num_classes, embedding_size, device=device, dtype=dtype))

    def state_before(self, labels: Tensor | None) -> list[Tensor]:
        assert labels is not None
        return [self.centers[self.classes(labels, len(self.centers))[0]]]

    @torch.no_grad()
    def restore_state(self, labels: Tensor | None, state: list[Tensor]) -> None:
        assert labels is not None
        self.centers[self.classes(labels, len(self.centers))[0]] = state[0]

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,). In training mode it moves the centers."""
        _checks.batch(embeddings, self.centers, labels)
        classes, valid = self.classes(labels, len(self.centers))
        dtype = compute_dtype(embeddings, self.centers)
        difference = F.embedding(classes, self.centers).to(dtype) - embeddings.to(dtype)
        loss = self.reduce(difference.square().sum(1) / 2, valid)
        if self.training:  # after the loss, so that a call that raises moves nothing
            self.move_centers(difference.detach(), classes, valid)
        return loss

    @torch.no_grad()
    def move_centers(self, difference: Tensor, classes: Tensor, valid: Tensor) -> None:
        valid = (valid & difference.isfinite().all(1)).unsqueeze(1)
        # The sums of a class go to the position of its first sample in the sorted batch.
        ordered = classes.sort().values
        position = torch.searchsorted(ordered, classes)
        # index_put_ in float64 adds in a fixed order on every device, so that results are reproducible bit for bit.
        count = torch.zeros(len(classes), 1, dtype=torch.float64, device=classes.device)
        total = torch.zeros_like(difference, dtype=torch.float64)
        count.index_put_((position,), valid.double(), accumulate=True)
        total.index_put_((position,), difference.double().masked_fill(~valid, 0.0), accumulate=True)
        move = -self.alpha * total / (1.0 + count)  # 0 in positions without a class's first sample
        self.update_state("centers", move.to(self.centers.dtype), ordered)

    def extra_repr(self) -> str:
        num_classes, embedding_size = self.centers.shape
        return f"num_classes={num_classes}, embedding_size={embedding_size}, alpha={self.alpha}"


class RingLoss(RunningState, AuxiliaryLoss):
    """Ring loss: pulls the norms of embeddings towards a learned radius.

    ``loss_i = (|x_i| - radius)^2 / 2`` (Zheng et al., CVPR 2018, arXiv:1803.00130, eq. 2). Multiply it by the paper's
    lambda when adding it to another loss.

    Args:
        radius: initial radius. None uses the mean norm of the first batch in training mode, as in the published code.
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(reduction, ignore_index)
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
        loss = self.reduce((norm - self.radius.where(self.initialised.clone(), mean.nan_to_num())).square() / 2, valid)
        if self.training:  # after the loss, so that a call that raises changes nothing
            self.initialise(mean)
        return loss

    @torch.no_grad()
    def mean_norm(self, norm: Tensor, valid: Tensor) -> Tensor:
        """Mean of the finite norms of samples that are not ignored; NaN if there is none."""
        valid = valid & norm.isfinite()
        return norm.masked_fill(~valid, 0.0).sum() / valid.sum()

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

    def __init__(self, *, reduction: str = "mean", ignore_index: int = -100):
        super().__init__(reduction, ignore_index)

    def forward(self, embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,), by class weights (C, D)."""
        _checks.batch(embeddings, weight, labels)
        refuse_stepped(weight)
        classes, valid = self.classes(labels, len(weight))
        dtype = compute_dtype(embeddings, weight)
        # Converted first, so that gradients of one class are added in this dtype.
        target = unit_rows(F.embedding(classes, weight.to(dtype)), dtype)[0]
        sample = unit_rows(embeddings, dtype)[0]
        # The ratio of the rhombus's diagonals is the tangent of half the angle. arccos would be inaccurate near 0.
        across, along = (torch.linalg.vector_norm(diagonal, dim=1) for diagonal in (sample - target, sample + target))
        return self.reduce(2.0 / math.pi * torch.atan2(across, along), valid)


class InterLoss(AuxiliaryLoss):
    """Inter-loss: minus the mean angle of the weight of a sample's class to the others, divided by pi.

    ``loss_i = -1 / (pi (C - 1)) * sum_{j != y_i} arccos(w_{y_i} . w_j)`` with unit-length class weights (ArcFace,
    arXiv:1801.07698, eq. 6). A class counts once per sample of the batch. The (N, C) cosines are computed in tiles. In
    the gradient sin(theta) is bounded below by the square root of the dtype's epsilon.

    Args:
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
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

    def __init__(self, *, reduction: str = "mean", ignore_index: int = -100, workspace_mb: float = 256):
        super().__init__(reduction, ignore_index)
        self.workspace_mb = workspace_mb

    def forward(self, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss of class weights (C, D), of which the classes in labels (N,) count."""
        _checks.class_weights(weight, at_least=2)
        _checks.labels(labels, weight)
        refuse_stepped(weight)
        classes, valid = self.classes(labels, len(weight))
        weight = weight.to(compute_dtype(weight))
        rows = F.embedding(classes, weight)
        angles = other_class_sums(rows, weight, classes, "angle", workspace_mb=self.workspace_mb)
        return self.reduce(-angles / (math.pi * (len(weight) - 1)), valid).to(weight.dtype)


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

    def __init__(self, *, batch_classes: bool = False, ignore_index: int = -100, workspace_mb: float = 256):
        super().__init__("mean", ignore_index)
        self.batch_classes, self.workspace_mb = batch_classes, workspace_mb

    def forward(self, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of class weights (C, D). Labels (N,) are needed with ``batch_classes``."""
        _checks.class_weights(weight, at_least=2)
        refuse_stepped(weight)
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

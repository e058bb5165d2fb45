"""Center loss: an auxiliary loss whose centers move by themselves."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.divided_samples import gather_labels
from fused_margin._ops.inputs import compute_dtype
from fused_margin.losses import settings
from fused_margin.losses.auxiliary_base import AuxiliaryLoss
from fused_margin.losses.running_state import RunningState, once_per_step


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
        process_group: divides the classes among the ranks of a torch.distributed group, as in
            :class:`fused_margin.MarginLoss`. ``centers`` then holds the centers of this rank's classes. Every rank calls
            the loss with its own samples, and gets the loss of the samples of all ranks (its own losses with
            ``reduction="none"``) and the gradients of that loss; the centers move as on one device. Default: None, no
            division.
        device: device of ``centers``.
        dtype: dtype of ``centers``, float32 or float64. Half precision becomes float32, because it would round small
            moves to 0.

    Shape:
        embeddings (N, D), labels (N,) -> scalar, or (N,) with ``reduction="none"``; float64 if an input is, else float32.

    Attributes:
        centers: (C, D) buffer, initially 0. If classes are divided, it holds the classes of this rank.
        shard: the :class:`fused_margin.distributed.Shard` of this rank, or None if classes are not divided.

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
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        num_classes = _checks.positive_index("num_classes", num_classes)
        embedding_size = _checks.positive_index("embedding_size", embedding_size)
        super().__init__(reduction, ignore_index, process_group, num_classes)
        self.alpha = alpha
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        rows = num_classes if self.shard is None else self.shard.size
        self.register_buffer("centers", torch.zeros(rows, embedding_size, device=device, dtype=dtype))

    def class_buffers(self) -> dict[str, Tensor]:
        return {"centers": self.centers}

    def state_before(self, labels: Tensor | None) -> list[Tensor]:
        """The rows of the batch's classes that this rank has, and their centers."""
        assert labels is not None
        if self.shard is None:
            rows = self.classes(labels, len(self.centers))[0]
        else:
            gathered = gather_labels(labels.to(torch.int64), self.shard, self.ignore_index)
            rows = gathered.labels[gathered.own_positions()] - self.shard.begin
        return [rows, self.centers[rows]]

    @torch.no_grad()
    def restore_state(self, labels: Tensor | None, state: list[Tensor]) -> None:
        rows, centers = state
        self.centers[rows] = centers

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,). In training mode it moves the centers."""
        _checks.batch(embeddings, self.centers, labels, at_least=1 if self.shard is None else 0)
        _checks.shard(self.shard, self.centers, 1, 0.0, name="centers")
        samples = self.at_classes(embeddings, labels, len(self.centers), self.shard)
        dtype = compute_dtype(embeddings, self.centers)
        difference = F.embedding(samples.classes, self.centers).to(dtype) - samples.embeddings.to(dtype)
        loss = self.reduce_samples(self.sample_losses(difference, samples.classes), samples, labels)
        if self.training:  # after the loss, so that a call that raises moves nothing
            self.move_centers(difference.detach(), samples.classes, samples.valid)
        return loss

    def sample_losses(self, difference: Tensor, classes: Tensor) -> Tensor:
        """The losses (S,) of samples, by the centers of their classes (S,) minus their embeddings, (S, D)."""
        return difference.square().sum(1) / 2

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
        num_rows, embedding_size = self.centers.shape
        num_classes = num_rows if self.shard is None else self.shard.num_classes
        return f"num_classes={num_classes}, embedding_size={embedding_size}, alpha={self.alpha}"

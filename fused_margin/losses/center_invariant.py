"""Center-invariant loss, which shares its centers with center loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin.losses import settings
from fused_margin.losses.center import CenterLoss


class CenterInvariantLoss(CenterLoss):
    """Center-invariant loss: pulls the squared norms of the class centers towards their mean, beside center loss.

    ::

        loss_i = gamma / 4 * (|c_{y_i}|^2 - 1/C * sum_k |c_k|^2)^2  +  center_weight * |x_i - c_{y_i}|^2 / 2

    With softmax, this is the objective of Wu, Liu, Li and Fu ("Deep Face Recognition with Center Invariant Loss", ACM
    Multimedia Thematic Workshops 2017), whose lambda is ``center_weight``. The centers are those of
    :class:`fused_margin.CenterLoss` and move as they do; they get no gradient. Embeddings are not normalized.

    The centers are stored, but the first term has a gradient by the embeddings, because a center stands for the mean of
    the n training images of its class: the derivative of c_{y_i} by x_i is 1 / n. As in the authors' published code, the
    gradient of loss_i by x_i is therefore::

        gamma * (|c_{y_i}|^2 - 1/C * sum_k |c_k|^2) * (1 - 1/C) / n_{y_i} * c_{y_i}

    Args:
        num_classes: number of classes, C.
        embedding_size: length of an embedding, D.
        alpha: step size of the centers, in [0, 1].
        gamma: weight of the first term. It grows with the fourth power of the norms, so it is small: 1e-5 in the
            published example.
        center_weight: weight of center loss. 0 leaves it out, for use beside a :class:`fused_margin.CenterLoss`.
        class_counts: (C,) number of training images of each class, n, so that a class has the same influence however
            many images it has. None is 1 for all classes.
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        process_group: divides the classes among the ranks of a torch.distributed group, as in
            :class:`fused_margin.CenterLoss`. Default: None, no division.
        device: device of ``centers``.
        dtype: dtype of ``centers``, float32 or float64. Half precision becomes float32.

    Shape:
        embeddings (N, D), labels (N,) -> scalar, or (N,) with ``reduction="none"``; float64 if an input is, else float32.

    Attributes:
        centers: (C, D) buffer, initially 0. If classes are divided, it holds the classes of this rank.
        class_counts: (C,) buffer or None, not saved in the state dict.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.CenterInvariantLoss(num_classes=2, embedding_size=2, gamma=1.0).eval()
        >>> _ = loss_fn.centers.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))  # squared norms 4 and 0, on average 2
        >>> loss_fn(torch.tensor([[3.0, 4.0]]), torch.tensor([0])).item()  # (4 - 2)^2 / 4
        1.0
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "gamma": settings.number(0.0),
        "center_weight": settings.number(0.0),
    }
    gamma: float
    center_weight: float
    class_counts: Tensor | None

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 0.5,
        gamma: float = 1.0,
        center_weight: float = 0.0,
        *,
        class_counts: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_classes,
            embedding_size,
            alpha,
            reduction=reduction,
            ignore_index=ignore_index,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self.num_classes = len(self.centers) if self.shard is None else self.shard.num_classes
        self.gamma, self.center_weight = gamma, center_weight
        self.register_buffer("class_counts", None, persistent=False)
        self.class_counts = class_counts

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "class_counts" and value is not None:
            try:
                value = torch.as_tensor(value, device=self.centers.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"class_counts: expected a tensor of integers, got {type(value).__name__}") from error
            if value.dtype not in _checks.INTEGERS:
                raise TypeError(f"class_counts: expected integers, got {value.dtype}")
            value = value.to(torch.int64)
            if tuple(value.shape) != (self.num_classes,):
                raise ValueError(f"class_counts: expected shape ({self.num_classes},), got {tuple(value.shape)}")
            if bool((value < 0).any()):
                raise ValueError(f"class_counts: expected numbers of at least 0, got {int(value.min())}")
        super().__setattr__(name, value)

    def sample_losses(self, difference: Tensor, classes: Tensor) -> Tensor:
        centers = F.embedding(classes, self.centers).to(difference.dtype)
        move = difference.detach() - difference  # 0, with the gradient of the embedding
        if self.class_counts is not None:
            of_all_ranks = classes if self.shard is None else classes + self.shard.begin
            move = move / self.class_counts[of_all_ranks].clamp(min=1).unsqueeze(1)
        # The mean is over all classes, so the own center is in it with a share of 1 / C.
        share = 1.0 / self.num_classes
        others = self.mean_square().to(centers.dtype) - share * centers.square().sum(1)
        deviation = (1.0 - share) * (centers + move).square().sum(1) - others
        center_losses = super().sample_losses(difference, classes)
        return self.gamma / 4 * deviation.square() + self.center_weight * center_losses

    def mean_square(self) -> Tensor:
        """The mean over all classes of the squared norms of the centers, float64."""
        total = torch.linalg.vector_norm(self.centers, dim=1).double().square().sum()
        return self.over_ranks(total) / self.num_classes

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}, center_weight={self.center_weight}"

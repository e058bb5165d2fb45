"""DeepFace's siamese loss: cross-entropy of same or different identity, from a learned weighted L1 distance."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.collectives import all_reduce_backward
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.normalization import unit_rows
from fused_margin._ops.weighted_l1 import weighted_l1_distances
from fused_margin.losses import settings
from fused_margin.losses.gathered import GatheredLoss

# Initial weights and bias. Two random unit vectors have an L1 distance of about 1.13 sqrt(D), so that with weights of
# 4 / sqrt(D) the log odds are 2 for equal features and about -2.5 for unrelated ones.
ALPHA, BIAS = 4.0, 2.0


class SiameseL1Loss(GatheredLoss):
    """DeepFace's siamese network: a logistic unit decides from the absolute differences of two features.

    The distance has learned weights, and the cross-entropy of "same identity" trains them and, through both features,
    the network (Taigman et al., CVPR 2014, sec. 4.2)::

        d(f1, f2)      = sum_i alpha_i |f1_i - f2_i|
        log odds       = bias - d(f1, f2)                       of one identity
        loss of a pair = log(1 + exp(-log odds))                genuine: one identity
                         log(1 + exp(log odds))                 impostor: two identities

    The pairs are all pairs of the batch, each once. Half of the loss is the mean over the genuine pairs and half the mean
    over the impostor pairs, as if equally many of both were drawn; a kind that the batch lacks adds 0. As in the paper,
    alpha is the weight of an ordinary linear unit and may have either sign, and features have unit length. Batches need
    several samples of an identity. Memory is O(N^2), not O(N^2 * D).

    :meth:`fused_margin.evaluation.WeightedL1Head.of_loss` verifies with the learned distance.

    Args:
        embedding_size: length of an embedding, D.
        normalize: whether embeddings are normalized to unit length first.
        balanced: False takes the mean over all pairs, of which most are impostor pairs.
        ignore_index: label of samples without an identity. They are in no pair.
        workspace_mb: bound on scratch memory in MiB, in addition to O(N^2).
        process_group: as in :class:`ContrastiveLoss`: the pairs are of the samples of all its ranks. Each rank computes a
            part of them, in O(N M) memory for N samples of the rank and M of all. All ranks have the same alpha and bias,
            with the same gradient.
        device, dtype: of the parameters.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar; float64 if an input is, else float32. Without any pair, the
        loss and its gradient are 0.

    Attributes:
        alpha: (D,) parameter, initially 4 / sqrt(D).
        bias: scalar parameter, initially 2: the log odds at distance 0.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> loss_fn = fused_margin.SiameseL1Loss(embedding_size=4)
        >>> embeddings = torch.eye(4)[[0, 0, 1]]  # L1 distances 0, 2 and 2, which have the weight 2
        >>> loss = loss_fn(embeddings, torch.tensor([7, 7, 9]))  # log odds 2, -2 and -2
        >>> round(loss.item(), 4)  # log(1 + exp(-2)) for every pair
        0.1269
        >>> loss.backward()
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "normalize": settings.boolean,
        "balanced": settings.boolean,
        "reduction": settings.one_of("mean"),
    }
    normalize: bool
    balanced: bool
    alpha: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        embedding_size: int,
        *,
        normalize: bool = True,
        balanced: bool = True,
        ignore_index: int = -100,
        workspace_mb: float = 256,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__("mean", ignore_index, process_group)
        size = _checks.positive_index("embedding_size", embedding_size)
        self.normalize, self.balanced, self.workspace_mb = normalize, balanced, workspace_mb
        self.alpha = nn.Parameter(torch.full((size,), ALPHA / math.sqrt(size), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(BIAS, device=device, dtype=dtype))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,)."""
        samples = self.gather(embeddings, labels)  # before further checks, so that all ranks raise their errors
        if samples.embeddings.shape[1] != len(self.alpha):
            raise ValueError(
                f"embeddings: expected embedding_size {len(self.alpha)}, got shape {tuple(embeddings.shape)}"
            )
        _checks.same_device("embeddings", embeddings, self.alpha)
        dtype, own, valid = compute_dtype(embeddings, self.alpha), samples.own, samples.valid
        rows = samples.embeddings.to(dtype)
        if self.normalize:
            rows = unit_rows(rows, dtype)[0]
        alpha, bias = (self.on_all_ranks(parameter).to(dtype) for parameter in (self.alpha, self.bias))
        distances = weighted_l1_distances(rows, alpha, own, workspace_mb=self.workspace_mb)
        is_pair = (valid[own].unsqueeze(1) & valid).triu(1 + own.start)
        same = samples.labels[own].unsqueeze(1) == samples.labels
        losses = F.binary_cross_entropy_with_logits(bias - distances, same.to(dtype), reduction="none")
        kinds = [is_pair & same, is_pair & ~same] if self.balanced else [is_pair]
        sums = torch.stack([losses.masked_fill(~kind, 0.0).sum() for kind in kinds]).double()
        counts = torch.stack([kind.sum() for kind in kinds])
        means = self.over_ranks(sums) / self.over_ranks(counts).clamp(min=1)  # 0 if there are no pairs of a kind
        return means.mean().to(dtype)

    def on_all_ranks(self, parameter: Tensor) -> Tensor:
        """A parameter that is the same on all ranks. Its gradient is the sum over ranks, and so the same, too."""
        return parameter if self.shard is None else all_reduce_backward(parameter, self.shard.name)

    def extra_repr(self) -> str:
        return f"embedding_size={len(self.alpha)}, normalize={self.normalize}, balanced={self.balanced}"

"""Losses over pairs of samples, without class weights: contrastive loss, and DeepID2's verification loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.library import register
from fused_margin._ops.recomputation import recomputing
from fused_margin._ops.sample_pairs import SamplePairs, distances, make_pairs
from fused_margin.losses import settings
from fused_margin.losses.auxiliary import AuxiliaryLoss
from fused_margin.losses.running_state import RunningState, once_per_step

FORMS = ("hadsell", "squared-distance", "double-margin")
AVERAGES = ("all", "separate", "separate-nonzero")


class SamplePairLoss(AuxiliaryLoss):
    """Base class of losses over the pairs of a batch's samples, which may be on several ranks."""

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"normalize": settings.boolean}
    normalize: bool

    def __init__(self, normalize: bool, reduction: str, ignore_index: int, process_group: dist.ProcessGroup | None):
        super().__init__(reduction, ignore_index, process_group)
        self.normalize = normalize

    def pairs(self, embeddings: Tensor, labels: Tensor, distance: str) -> SamplePairs:
        """The pairs of embeddings (N, D) with labels (N,), after checks of both."""
        _checks.matrix("embeddings", embeddings, "(N, embedding_size)")
        _checks.per_sample_index("labels", labels, embeddings)
        return make_pairs(embeddings, labels, distance, self.normalize, self.ignore_index, self.shard)

    def reduce_sums(self, pairs: SamplePairs, sums: list[Tensor], counts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The reduction of sums (N,) over each sample's pairs or triplets. "mean" divides each by its count, in turn.

        Args:
            pairs: of this rank's samples.
            sums: of this rank's samples, one tensor per mean.
            counts: number of summands of this rank, 0-d, one per mean. A mean over nothing is 0.
            dtype: of the result.
        """
        if self.reduction == "none":
            return torch.stack(sums).sum(0).to(dtype)
        total = pairs.sum_over_ranks(torch.stack([each.sum() for each in sums]))
        if self.reduction == "mean":
            total = total / pairs.sum_over_ranks(torch.stack(counts).double()).clamp_min(1.0)
        return total.sum().to(dtype)

    def average_pairs(self, pairs: SamplePairs, values: Tensor, average: str, dtype: torch.dtype) -> Tensor:
        """The reduction of values (N, M), of which each unordered pair has two."""
        kinds = [pairs.genuine, pairs.impostor]
        sums = [values.masked_fill(~kind, 0.0).sum(1) / 2 for kind in kinds]
        if average == "separate-nonzero":
            kinds = [kind & ~(values <= 0) for kind in kinds]  # with NaN
        counts = [kind.sum().double() / 2 for kind in kinds]
        if average == "all":
            sums, counts = [sums[0] + sums[1]], [counts[0] + counts[1]]
        return self.reduce_sums(pairs, sums, counts, dtype)


class ContrastiveLoss(SamplePairLoss):
    r"""Contrastive loss: pulls the two samples of a genuine pair together, and pushes those of an impostor pair apart.

    With the distance D of two samples, the loss of a genuine and of an impostor pair is, for each ``form``::

        "hadsell"            max(0, D - m_p)^2 / 2       max(0, m - D)^2 / 2
        "squared-distance"   max(0, D^2 - m_p) / 2       max(0, m - D^2) / 2
        "double-margin"      max(0, D - m_p)             max(0, m - D)

    The first, with m_p = 0, is that of Hadsell, Chopra and LeCun (CVPR 2006, eq. 4) and of DeepID2 (arXiv:1406.4773,
    eq. 2). The second, with m_p = 0, is ``(1 - y) / 2 D^2 + y / 2 max(0, m - D^2)`` with y = 1 for impostors. The third
    does not square. The pairs are those of the batch, each once. Hadsell et al. sum over pairs (eq. 2); the default here
    is the mean. In a batch of many classes most pairs are impostors: ``average="separate"`` gives both kinds the same
    weight.

    Memory is O(N^2 + N D). The gradient is exact. It is 0 at D = 0, where D has no derivative.

    Args:
        margin: m, a distance, or a squared distance with "squared-distance". Distances of unit-length embeddings are at
            most 2.
        positive_margin: m_p, at most m.
        form: as above.
        normalize: whether embeddings are scaled to unit length. False takes them as they are.
        average: what ``reduction="mean"`` is. "all": the mean over all pairs. "separate": the mean over genuine pairs
            plus the mean over impostor pairs. "separate-nonzero": the same over the pairs with a loss above 0, as in
            pytorch-metric-learning. A mean over no pairs is 0.
        reduction: "mean", "sum" over pairs, or "none": for each sample, half the sum over its pairs.
        ignore_index: label of samples that take part in no pair.
        process_group: the pairs are those of the samples of all its ranks, which may have different N, and the result is
            that of one device with all samples. Every rank must make every call. DistributedDataParallel divides the
            gradients of the backbone by the number of ranks, which
            ``embeddings.register_hook(lambda g: g * world_size)`` undoes.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``; float64 if ``embeddings``
        is, else float32. Any integer is a label. 0, with a gradient of 0, for a batch without pairs.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> embeddings = torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.5]])  # distances 1, 0.5 and 0.67
        >>> labels = torch.tensor([0, 0, 1])
        >>> contrastive_loss = fused_margin.ContrastiveLoss(normalize=False, reduction="sum")
        >>> round(contrastive_loss(embeddings, labels).item(), 4)  # 1 / 2 + (1 - 0.5)^2 / 2 + (1 - 0.67)^2 / 2
        0.6792
        >>> contrastive_loss.form = "squared-distance"
        >>> round(contrastive_loss(embeddings, labels).item(), 4)  # 1 / 2 + (1 - 0.25) / 2 + (1 - 0.45) / 2
        1.15
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {
        "margin": settings.number(0.0),
        "positive_margin": settings.number(0.0),
        "form": settings.one_of(*FORMS),
        "average": settings.one_of(*AVERAGES),
    }
    margin: float
    positive_margin: float
    form: str
    average: str

    def __init__(
        self,
        margin: float = 1.0,
        positive_margin: float = 0.0,
        *,
        form: str = "hadsell",
        normalize: bool = True,
        average: str = "all",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(normalize, reduction, ignore_index, process_group)
        self.margin, self.positive_margin, self.form, self.average = margin, positive_margin, form, average

    def check_together(self, values: dict[str, Any]) -> None:
        margin, positive = values.get("margin", math.inf), values.get("positive_margin", 0.0)
        if positive > margin:
            raise ValueError(f"positive_margin: expected at most margin ({margin}), got {positive}")

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,)."""
        pairs = self.pairs(embeddings, labels, "squared" if self.form == "squared-distance" else "euclidean")
        values = pair_values(pairs, self.margin, self.positive_margin)
        if self.form == "hadsell":
            values = values.square()
        if self.form != "double-margin":
            values = values / 2
        return self.average_pairs(pairs, values, self.average, compute_dtype(embeddings))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, positive_margin={self.positive_margin}, form={self.form!r}"


def pair_values(pairs: SamplePairs, margin: float | Tensor, positive_margin: float) -> Tensor:
    """How far pairs (N, M) are on the wrong side of their margin; of no use for pairs that are of neither kind."""
    return torch.where(pairs.genuine, pairs.distance - positive_margin, margin - pairs.distance).relu()


class DeepID2Loss(RunningState, SamplePairLoss):
    """DeepID2's verification loss: contrastive loss whose margin is the verification threshold of recent pairs.

    With the distance D of two samples, ``D^2 / 2`` for a genuine pair and ``max(0, m - D)^2 / 2`` for an impostor pair
    (Sun, Wang and Tang, arXiv:1406.4773, eq. 2). The margin m is learned, but not by its gradient, which would shrink it
    to 0. In training mode, whenever ``update_every`` pairs have been seen, m becomes the threshold on D that minimizes
    the verification error over these pairs (section 2): the mean of the shares of rejected genuine pairs and of accepted
    impostor pairs, so that the many impostor pairs of a batch do not push it to 0.

    DeepID2 trains on ``softmax + 0.05 * verification`` (joint identification and verification, section 4.1).

    Memory is O(N^2 + N D) and the recent pairs. The gradient is exact. It is 0 at D = 0, where D has no derivative.

    Args:
        margin: initial m. None takes the threshold of the first batch that has pairs of both kinds.
        update_every: number of pairs after which m is updated. A batch of N samples has N (N - 1) / 2 pairs, and a
            batch counts as a whole.
        normalize: whether embeddings are scaled to unit length. The paper takes them as they are.
        average: as in :class:`ContrastiveLoss`.
        reduction, ignore_index, process_group: as in :class:`ContrastiveLoss`. All ranks have the same m.
        device: device of the buffers.

    Shape:
        embeddings (N, D), labels (N,) integers -> scalar, or (N,) with ``reduction="none"``; float64 if ``embeddings``
        is, else float32. 0, with a gradient of 0, for a batch without pairs.

    Attributes:
        margin: 0-d float64 buffer, m. NaN until it is known.
        recent_distance: (update_every,) float64 buffer, distances of the pairs since the last update.
        recent_genuine: (update_every,) bool buffer, whether these pairs are genuine.
        recent_count: 0-d int64 buffer, the number of these pairs.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> verification = fused_margin.DeepID2Loss(margin=2.0, update_every=3, reduction="sum")
        >>> embeddings = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 5.0]])  # a genuine pair at 1, impostors at 5 and 4
        >>> verification(embeddings, torch.tensor([0, 0, 1])).item()
        0.5
        >>> verification.margin.item()  # three pairs have been seen, and 2.5 separates them
        2.5
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {"average": settings.one_of(*AVERAGES)}
    FIXED: ClassVar[tuple[str, ...]] = ("update_every", "process_group")
    RUNNING_BUFFERS = ("margin", "recent_distance", "recent_genuine", "recent_count")
    average: str
    margin: Tensor
    recent_distance: Tensor
    recent_genuine: Tensor
    recent_count: Tensor

    def __init__(
        self,
        margin: float | None = None,
        update_every: int = 200_000,
        *,
        normalize: bool = False,
        average: str = "all",
        reduction: str = "mean",
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(normalize, reduction, ignore_index, process_group)
        if margin is not None:
            _checks.number("margin", margin, 0.0)
        self.update_every = _checks.positive_index("update_every", update_every)
        self.average = average
        initial = math.nan if margin is None else float(margin)
        self.register_buffer("margin", torch.tensor(initial, device=device, dtype=torch.float64))
        self.register_buffer("recent_distance", torch.zeros(update_every, device=device, dtype=torch.float64))
        self.register_buffer("recent_genuine", torch.zeros(update_every, device=device, dtype=torch.bool))
        self.register_buffer("recent_count", torch.zeros((), device=device, dtype=torch.int64))

    def state_before(self, labels: Tensor | None) -> list[Tensor]:
        return [self.margin.clone()]  # all that a recomputation reads, which counts no pairs

    @torch.no_grad()
    def restore_state(self, labels: Tensor | None, state: list[Tensor]) -> None:
        self.margin.copy_(state[0])

    @once_per_step
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,). In training mode it counts the pairs and may update m."""
        pairs = self.pairs(embeddings, labels, "euclidean")
        of_batch = batch_pairs(pairs)
        margin = first_margin(self.margin, *of_batch)
        loss = pair_values(pairs, margin.nan_to_num(), 0.0).square() / 2
        loss = self.average_pairs(pairs, loss, self.average, compute_dtype(embeddings))
        if self.training and not recomputing():  # after the loss, so that a call that raises changes nothing
            count_pairs(self.margin, self.recent_distance, self.recent_genuine, self.recent_count, margin, *of_batch)
        return loss

    def extra_repr(self) -> str:
        return f"update_every={self.update_every}, normalize={self.normalize}"


@torch.no_grad()
def batch_pairs(pairs: SamplePairs) -> tuple[Tensor, Tensor, Tensor]:
    """Distances (M, M) of the samples of all ranks, whether they are of one class, and whether a pair counts.

    Each unordered pair counts once, if its samples are not ignored and its distance is finite.
    """
    distance = distances(pairs.samples, pairs.samples, "euclidean") if pairs.group else pairs.distance.detach()
    counts = (pairs.valid.unsqueeze(1) & pairs.valid & distance.isfinite()).triu(1)
    return distance, pairs.labels.unsqueeze(1) == pairs.labels, counts


def _first_margin(margin: Tensor, distance: Tensor, genuine: Tensor, counts: Tensor) -> Tensor:
    """The margin (0-d), or the threshold of a batch if it is NaN."""
    if not bool(margin.isnan()):
        return margin.clone()
    return verification_threshold(distance[counts], genuine[counts])


def _count_pairs(
    margin: Tensor,
    recent_distance: Tensor,
    recent_genuine: Tensor,
    recent_count: Tensor,
    used_margin: Tensor,
    distance: Tensor,
    genuine: Tensor,
    counts: Tensor,
) -> None:
    """Adds the pairs of a batch, used with `used_margin`, to the recent pairs, and updates the margin if they are enough."""
    if torch._C._current_graph_task_id() != -1:  # the backward of a compiled graph recomputes it
        return
    distance, genuine = distance[counts], genuine[counts]
    begin = int(recent_count)
    end = begin + len(distance)
    if end < len(recent_distance):
        recent_distance[begin:end], recent_genuine[begin:end] = distance, genuine
        recent_count.fill_(end)
        margin.copy_(used_margin)
        return
    threshold = verification_threshold(
        torch.cat([recent_distance[:begin], distance]), torch.cat([recent_genuine[:begin], genuine])
    )
    margin.copy_(torch.where(threshold.isnan(), used_margin, threshold))
    recent_count.zero_()


def verification_threshold(distance: Tensor, genuine: Tensor) -> Tensor:
    """The threshold (0-d float64) on distances (P,) that minimizes the mean of both error rates.

    It is halfway between two neighbouring distances; NaN if there are no genuine or no impostor pairs.
    """
    distance, order = distance.double().sort()
    genuine = genuine[order]
    positives, negatives = genuine.sum().double(), (~genuine).sum().double()
    if not int(positives) or not int(negatives):
        return distance.new_full((), math.nan)
    # The threshold behind the first k distances accepts k pairs. No threshold separates equal distances.
    rejected = (positives - genuine.cumsum(0)) / positives
    accepted = (~genuine).cumsum(0) / negatives
    error = (rejected + accepted)[:-1].masked_fill(distance.diff() == 0, math.inf)
    best = error.argmin()
    return (distance[best] + distance[best + 1]) / 2


first_margin = register("first_margin", _first_margin, lambda margin, *_: torch.empty_like(margin))
count_pairs = register(
    "count_pairs",
    _count_pairs,
    lambda *_: None,
    mutates=("margin", "recent_distance", "recent_genuine", "recent_count"),
)

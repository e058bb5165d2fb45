"""GroupFace: embeddings with group-aware representations, and the loss that learns the groups."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops.inputs import compute_dtype
from fused_margin.losses import settings
from fused_margin.losses.auxiliary import AuxiliaryLoss
from fused_margin.losses.running_state import RunningState, once_per_step


class GroupFaceOutput(NamedTuple):
    """What :class:`GroupFace` returns in training mode.

    Attributes:
        embeddings: (N, D), for a loss with class weights such as :class:`ArcFaceLoss`.
        group_logits: (N, K), for :class:`SelfGroupingLoss`.

    Examples:
        >>> import torch, fused_margin
        >>> embeddings, group_logits = fused_margin.GroupFace(8, 4, num_groups=3)(torch.randn(2, 8))
        >>> embeddings.shape, group_logits.shape
        (torch.Size([2, 4]), torch.Size([2, 3]))
    """

    embeddings: torch.Tensor
    group_logits: torch.Tensor


class GroupFace(nn.Module):
    """The head of GroupFace: the features of a backbone to embeddings that depend on latent groups.

    With shared features z of a sample, an instance-based representation, one group-aware representation for each of K
    groups, and a group decision network f of three fully connected layers (Kim et al., CVPR 2020, arXiv:2005.10497,
    sec. 3.1)::

        v         = W z + b
        v^{G_k}   = W_k z + b_k                               k = 1 ... K
        p(G_k)    = softmax_k(f(v))
        embedding = v + sum_k p(G_k) v^{G_k}                  aggregation="soft", S-GroupFace
        embedding = v + v^{G_k}, k = argmax_k p(G_k)          aggregation="hard", H-GroupFace

    :class:`SelfGroupingLoss` trains the groups. All K representations are one matrix product with O(N * K * D) memory.
    The forward has no side effects: the running state of the method is in the loss.

    Args:
        in_features: length of the shared features. The paper has 4,096 for embeddings of length 512.
        embedding_size: length of an embedding, D.
        num_groups: K. The paper has 32.
        aggregation: ``"soft"`` or ``"hard"``. With ``"hard"`` the decision network gets no gradient from the embeddings.
        hidden_features: width of both hidden layers of the decision network, which have PReLU.
        device, dtype: of the parameters.

    Shape:
        features (N, in_features) -> :class:`GroupFaceOutput` in training mode; embeddings (N, D) in evaluation mode.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> head = fused_margin.GroupFace(in_features=64, embedding_size=16, num_groups=4)
        >>> arcface = fused_margin.ArcFaceLoss(num_classes=10, embedding_size=16, scale=16.0)
        >>> group_loss = fused_margin.SelfGroupingLoss(num_groups=4)
        >>> features, labels = torch.randn(8, 64), torch.arange(8)  # of any backbone
        >>> output = head(features)
        >>> loss = arcface(output.embeddings, labels) + 0.1 * group_loss(output.group_logits)
        >>> loss.backward()
        >>> head.eval()(features).shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        in_features: int,
        embedding_size: int,
        num_groups: int = 32,
        *,
        aggregation: str = "soft",
        hidden_features: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = _checks.positive_index("in_features", in_features)
        self.embedding_size = _checks.positive_index("embedding_size", embedding_size)
        self.num_groups = _checks.positive_index("num_groups", num_groups)
        self.aggregation = _checks.one_of("aggregation", aggregation, ("soft", "hard"))
        hidden = _checks.positive_index("hidden_features", hidden_features)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, device=device, dtype=dtype)

        def prelu() -> nn.PReLU:
            return nn.PReLU(hidden, device=device, dtype=dtype)

        self.instance = linear(self.in_features, self.embedding_size)
        self.groups = linear(self.in_features, self.num_groups * self.embedding_size)
        self.decision = nn.Sequential(
            linear(self.embedding_size, hidden),
            prelu(),
            linear(hidden, hidden),
            prelu(),
            linear(hidden, self.num_groups),
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial weights, alike for all representations. Biases are 0, so that groups depend on the sample."""
        nn.init.xavier_normal_(self.instance.weight)
        for group in self.groups.weight.unflatten(0, (self.num_groups, self.embedding_size)):
            nn.init.xavier_normal_(group)
        for layer in self.decision.children():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.25)  # the initial slope of a PReLU
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> GroupFaceOutput | Tensor:
        """Embeddings (N, D) of features (N, in_features); in training mode with the logits of the groups."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a tensor of shape (N, in_features), got {type(features).__name__}")
        if features.dim() != 2 or features.shape[1] != self.in_features:
            raise ValueError(f"features: expected shape (N, {self.in_features}), got {tuple(features.shape)}")
        instance = self.instance(features)
        group_logits = self.decision(instance)
        group_aware = self.groups(features).unflatten(1, (self.num_groups, self.embedding_size))
        if self.aggregation == "soft":
            probability = group_logits.softmax(1, dtype=compute_dtype(group_logits)).to(group_aware.dtype)
            aggregated = torch.bmm(probability.unsqueeze(1), group_aware).squeeze(1)
        else:
            chosen = group_logits.argmax(1)[:, None, None].expand(-1, 1, self.embedding_size)
            aggregated = group_aware.gather(1, chosen).squeeze(1)
        embeddings = instance + aggregated
        return GroupFaceOutput(embeddings, group_logits) if self.training else embeddings

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, embedding_size={self.embedding_size}, num_groups={self.num_groups}, "
            f"aggregation={self.aggregation!r}"
        )


class SelfGroupingLoss(RunningState, AuxiliaryLoss):
    """GroupFace's self-grouping loss: the cross-entropy of the groups with self-distributed labels.

    The label of a sample is the group whose probability exceeds its mean over the data most, so that all groups get
    about the same number of samples (Kim et al., CVPR 2020, arXiv:2005.10497, eq. 8 and sec. 3.2)::

        p(G_k|x)   = softmax_k(logits)
        p~(G_k|x)  = (p(G_k|x) - E_x[p(G_k|x)]) / K + 1 / K
        G*(x)      = argmax_k p~(G_k|x)
        loss_i     = -log p(G*(x_i)|x_i)

    E_x is the mean over the samples of recent batches, including the one of the call; in evaluation mode the batch of the
    call is not among them. No gradient flows through the labels. A sample with NaN does not change E_x. Multiply the loss
    by the paper's lambda, 0.1, when adding it to another loss.

    Args:
        num_groups: number of groups, K.
        batches: number of batches in E_x. Where the network changes fast, as in short trainings, E_x of many batches lags
            behind, and all samples may get one group until it has caught up.
        process_group: the ranks whose samples E_x and the reduction are over. Every rank makes every call, also with no
            samples. The gradient is that of the rank's own samples, as of a loss with divided classes.
        reduction, ignore_index: as in ``torch.nn.CrossEntropyLoss``.
        device: device of ``recent``.

    Shape:
        group_logits (N, K), labels (N,) or None -> scalar, or (N,) with ``reduction="none"``; float64 if the logits are,
        else float32. Labels only determine which samples are ignored.

    Attributes:
        recent: (batches, K) float64 buffer: sums of the probabilities over each recent batch, the latest last. Every
            forward in training mode updates it.

    Raises:
        ValueError, TypeError: for an invalid argument. The message names the argument, the expected and the given value.

    Examples:
        >>> import torch, fused_margin
        >>> group_loss = fused_margin.SelfGroupingLoss(num_groups=2)
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> loss = group_loss(logits)
        >>> group_loss.group_labels(logits)  # the second sample's probability of group 0 is below the mean
        tensor([0, 1])
    """

    SETTINGS: ClassVar[dict[str, settings.Check]] = {}
    RUNNING_BUFFERS = ("recent",)
    LABELS_OPTIONAL = True
    recent: Tensor

    def __init__(
        self,
        num_groups: int,
        *,
        batches: int = 128,
        process_group: dist.ProcessGroup | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ):
        super().__init__(reduction, ignore_index, process_group)
        num_groups = _checks.positive_index("num_groups", num_groups)
        batches = _checks.positive_index("batches", batches)
        self.register_buffer("recent", torch.zeros(batches, num_groups, device=device, dtype=torch.float64))

    @property
    def expectation(self) -> Tensor:
        """Mean probabilities (K,) float64 over the recent batches, which E_x is; 1 / K before the first."""
        return _mean_probability(self.recent)

    @torch.no_grad()
    def group_labels(self, group_logits: Tensor) -> Tensor:
        """Self-distributed labels (N,) int64 of logits (N, K), by the current ``expectation``."""
        return _self_distributed(_probability(group_logits), self.expectation)

    def forward(self, group_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss of logits (N, K). Labels (N,), if given, determine which samples are ignored."""
        return self._step(group_logits, labels)

    @once_per_step
    def _step(self, group_logits: Tensor, labels: Tensor | None) -> Tensor:
        num_groups = self.recent.shape[1]
        _checks.matrix("group_logits", group_logits, "(N, num_groups)")
        if group_logits.shape[1] != num_groups:
            raise ValueError(f"group_logits: expected shape (N, {num_groups}), got {tuple(group_logits.shape)}")
        _checks.same_device("group_logits", group_logits, self.recent)
        valid = torch.ones(len(group_logits), dtype=torch.bool, device=group_logits.device)
        if labels is not None:
            _checks.per_sample_index("labels", labels, group_logits)
            valid = labels.to(torch.int64) != self.ignore_index
        probability = _probability(group_logits.detach())
        recent = self.next_recent(probability, valid) if self.training else self.recent
        target = _self_distributed(probability, _mean_probability(recent))
        logits = group_logits.to(compute_dtype(group_logits))
        loss = self.reduce(F.cross_entropy(logits, target, reduction="none"), valid)
        if self.training:  # after the loss, so that a call that raises changes nothing
            self.update_state("recent", recent)
        return loss

    @torch.no_grad()
    def next_recent(self, probability: Tensor, valid: Tensor) -> Tensor:
        """``recent`` with the sums of this batch, if it has a sample that is not ignored and has no NaN."""
        valid = (valid & probability.isfinite().all(1)).unsqueeze(1)
        sums = self.over_ranks(probability.masked_fill(~valid, 0.0).sum(0))
        return torch.where(sums.sum() > 0, torch.cat([self.recent[1:], sums.unsqueeze(0)]), self.recent)

    def extra_repr(self) -> str:
        batches, num_groups = self.recent.shape
        return f"num_groups={num_groups}, batches={batches}"


def _probability(group_logits: Tensor) -> Tensor:
    return group_logits.softmax(1, dtype=torch.float64)


def _mean_probability(recent: Tensor) -> Tensor:
    """The mean (K,) over all samples: the probabilities of a sample have the sum 1, so the sum of all is their number."""
    total = recent.sum(0)
    return torch.where(total.sum() > 0, total / total.sum(), 1.0 / recent.shape[1])


def _self_distributed(probability: Tensor, expectation: Tensor) -> Tensor:
    """argmax of p~, which is also that of p - E: the factor 1 / K and the summand 1 / K are the same for all groups."""
    return (probability - expectation).argmax(1)

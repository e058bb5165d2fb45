"""Reference implementation in plain PyTorch: every formula with whole N x C and C x C matrices, in any dtype.

The tests compare with it in float64. It is slow, needs O(N * C + C * C) memory, and can be differentiated any number of
times. Gradients are undefined (NaN) for a cosine of exactly +-1. It imports only torch, so that it is independent of the
code under test.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "cosine_logsumexp",
    "exclusive_regularization",
    "linear_cross_entropy",
    "margin_cross_entropy",
    "nearest_class",
    "normalize",
    "psi",
]


def normalize(rows: Tensor) -> Tensor:
    """Rows of unit length; rows shorter than 1e-12 become zero.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> reference.normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norm = rows.norm(dim=1, keepdim=True)
    short = norm < 1e-12
    return torch.where(short, 0.0, rows / torch.where(short, 1.0, norm))


def psi(
    cosine: Tensor,
    m1: float | Tensor = 1.0,
    m2: float | Tensor = 0.0,
    m3: float | Tensor = 0.0,
    *,
    beyond_pi: str = "monotone",
    easy: bool = False,
    gradient: str = "exact",
    annealing: float | Tensor = 0.0,
) -> Tensor:
    """The target cosine (N,) after the margin; arguments as in :class:`fused_margin.Margin`.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> reference.psi(torch.tensor([1.0, 0.0]), m2=0.5)  # cos(0.5), cos(pi / 2 + 0.5)
        tensor([ 0.8776, -0.4794])
    """
    cosine = cosine.clamp(-1.0, 1.0)
    theta = torch.acos(cosine)
    phi = m1 * theta + m2
    if beyond_pi == "monotone":
        k = torch.floor(phi.detach() / math.pi)
        value = (1 - 2 * (k % 2)) * torch.cos(phi) - 2 * k - m3
    elif beyond_pi == "linear":
        m2 = torch.as_tensor(m2, dtype=cosine.dtype)
        value = torch.where(phi > math.pi, cosine - m2 * torch.sin(m2), torch.cos(phi) - m3)
    else:
        value = torch.cos(phi) - m3
    if easy:
        value = torch.where(cosine > 0, value, cosine)
    if gradient == "straight_through":
        value = value.detach() + cosine - cosine.detach()
    return (annealing * cosine + value) / (1 + annealing)


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: dict | None = None,
    scale: float | Tensor | None = 64.0,
    *,
    exclusive_weight: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sub_centers: int = 1,
    hard_negatives: tuple[Tensor, float | None] | None = None,
) -> Tensor:
    """Cross-entropy over scaled cosines with a margin on the target, plus RegularFace's exclusive term.

    As :func:`fused_margin.functional.margin_cross_entropy`, except for two arguments.

    Args:
        margin: keyword arguments of :func:`psi`.
        hard_negatives: (threshold, strength), or (threshold, None) for FilteredNegatives.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> embeddings, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> loss = reference.margin_cross_entropy(embeddings, weight, labels, {"m3": 0.35}, scale=4.0)
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-4 (1 - 0.35)))
        0.1385
    """
    cosine = normalize(embeddings) @ normalize(weight).t()
    cosine = cosine.unflatten(1, (-1, sub_centers)).max(dim=2).values
    labels = labels.long()
    rows = torch.arange(len(labels), device=labels.device)
    columns = labels.clamp(0, cosine.shape[1] - 1)  # an ignored label also needs a valid index
    target = psi(cosine[rows, columns], **(margin or {}))
    if hard_negatives is not None:
        threshold, strength = hard_negatives
        above = 0.0 if strength is None else cosine * (strength + cosine)
        cosine = torch.where(cosine > threshold.unsqueeze(1), above, cosine)
    if scale is None:
        scale = embeddings.norm(dim=1)
    scale = torch.as_tensor(scale, dtype=cosine.dtype, device=cosine.device).reshape(-1, 1)
    logits = scale * cosine.index_put((rows, columns), target)
    loss = F.cross_entropy(
        logits,
        labels,
        weight=None if class_weight is None else class_weight.to(logits.dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss + exclusive_weight * exclusive_regularization(weight) if exclusive_weight else loss


def linear_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    margin: dict | None = None,
    **cross_entropy_options,
) -> Tensor:
    """Cross-entropy over inner products: plain softmax, or L-softmax with a margin.

    As :func:`fused_margin.functional.linear_cross_entropy`, with the keyword arguments of :func:`psi` as ``margin``.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> round(reference.linear_cross_entropy(torch.eye(3), torch.eye(3), torch.arange(3)).item(), 4)
        0.5514
    """
    logits = F.linear(embeddings, weight, bias)
    if margin is not None:
        rows = torch.arange(len(labels), device=labels.device)
        own = weight[labels]
        cosine = (normalize(embeddings) * normalize(own)).sum(dim=1)
        target = embeddings.norm(dim=1) * own.norm(dim=1) * psi(cosine, **margin)
        logits = logits.index_put((rows, labels), target + (0.0 if bias is None else bias[labels]))
    return F.cross_entropy(logits, labels, **cross_entropy_options)


def cosine_logsumexp(
    embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float | Tensor = 64.0
) -> tuple[Tensor, Tensor]:
    """The logsumexp and the target cosines of N x C cosines.

    As :func:`fused_margin.functional.cosine_logsumexp`.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> others, cosine = reference.cosine_logsumexp(torch.eye(3), torch.eye(3), torch.arange(3))
        >>> others, cosine  # log(exp(0) + exp(0)), and 1
        (tensor([0.6931, 0.6931, 0.6931]), tensor([1., 1., 1.]))
    """
    cosine = normalize(embeddings) @ normalize(weight).t()
    own = F.one_hot(labels.long(), weight.shape[0]).bool()
    scale = torch.as_tensor(scale, dtype=cosine.dtype).reshape(-1, 1)
    return torch.logsumexp((scale * cosine).masked_fill(own, -math.inf), dim=1), cosine[own]


def nearest_class(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest other class of every class, and its cosine.

    As :func:`fused_margin.functional.nearest_class` of class weights (C, D), for one nearest class.

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> reference.nearest_class(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
        (tensor([ 0.7071,  0.7071, -0.7071]), tensor([1, 0, 1]))
    """
    unit = normalize(weight)
    cosine = (unit @ unit.t()).masked_fill(torch.eye(len(weight), dtype=torch.bool, device=weight.device), -math.inf)
    best = cosine.max(dim=1)
    return best.values, best.indices


def exclusive_regularization(weight: Tensor) -> Tensor:
    """RegularFace's exclusive term: the mean cosine of the classes to their nearest other class.

    As :func:`fused_margin.functional.exclusive_regularization` of class weights (C, D).

    Examples:
        >>> import torch
        >>> from fused_margin import reference
        >>> reference.exclusive_regularization(torch.eye(3)).item()
        0.0
    """
    return nearest_class(weight)[0].mean()

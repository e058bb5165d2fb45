"""Functional interface: softmax losses with and without margins, and the exclusive term, over (C, D) class weights."""

import torch
from torch import Tensor

from fused_margin import _checks, _cross_entropy
from fused_margin._ops import library
from fused_margin._ops.backends.select import select_backend
from fused_margin._ops.inputs import MIB, LossInputs, compute_dtype
from fused_margin.distributed import Shard
from fused_margin.margins import FilteredNegatives, HardNegatives, Margin
from fused_margin.nearest import NearestClass, Separability, exclusive_regularization, nearest_class, separability

__all__ = [
    "NearestClass",
    "Separability",
    "cosine_logsumexp",
    "exclusive_regularization",
    "linear_cross_entropy",
    "margin_cross_entropy",
    "nearest_class",
    "separability",
]


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin = Margin(),  # noqa: B008 - immutable
    scale: float | Tensor | None = 64.0,
    *,
    exclusive_weight: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sub_centers: int = 1,
    hard_negatives: HardNegatives | FilteredNegatives | None = None,
    nearest: NearestClass | None = None,
    shard: Shard | None = None,
    workspace_mb: float = 256,
) -> Tensor:
    """Cross-entropy over scaled cosines with a margin on the target, plus RegularFace's exclusive term.

    With unit-length rows x and w, ``cos_ij = x_i . w_j``, the angle ``theta_i`` between a sample and its class, and psi
    of :class:`fused_margin.Margin`::

        z_i    = scale_i * psi(theta_i)
        loss_i = log(exp z_i + sum_{j != y_i} exp(scale_i * cos_ij)) - z_i
        result = reduce(loss_i) + exclusive_weight / C * sum_j max_{k != j} w_j . w_k

    (ArcFace, arXiv:1801.07698, eq. 4; exclusive term: RegularFace, CVPR 2019, eq. 8.) The (N, C) logits and the
    (C, C) cosines are computed in chunks; scratch memory is ``workspace_mb`` plus O(N * D + C). A row shorter than
    1e-12 counts as zero: its cosines and gradients are 0.

    Args:
        embeddings: (N, D), float32, float64, float16 or bfloat16, any strides.
        weight: (C, D) class weights on the same device; the dtype may differ. They need not be normalized.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: the margin. Its numbers may be (N,) tensors.
        scale: positive number, or (N,) or 0-d tensor of non-negative numbers (differentiable), or None for the norm of
            each embedding (SphereFace).
        exclusive_weight: lambda of the exclusive term. Not supported with ``reduction="none"``.
        class_weight, reduction, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        sub_centers: S rows of weight per class, (C * S, D), class by class. The cosine to a class is the cosine to its
            nearest row (sub-center ArcFace, ECCV 2020, eq. 3). Not supported with the exclusive term or label smoothing.
        hard_negatives: weights hard negatives (:class:`fused_margin.margins.HardNegatives`; ``scale`` must then be a
            number), or replaces their cosines by 0 (:class:`fused_margin.margins.FilteredNegatives`). Not supported
            with label smoothing.
        nearest: the nearest other class of every class, for the exclusive term, if it is known (see
            :class:`fused_margin.ExclusiveRegularizer`). None searches for it.
        shard: the slice of the classes in ``weight``, if classes are divided among ranks. Each rank passes its own
            embeddings and labels; their number may differ. Labels and ``class_weight`` are over all classes. Every rank
            gets the loss of all samples (its own losses with ``reduction="none"``), and in the backward the gradients
            for its embeddings and its classes. With a ``sample_rate`` below 1 the gradient of ``weight`` is sparse.
        workspace_mb: bound on scratch memory in MiB. The forward saves exponentials that fit in it for the backward,
            which recomputes the others. A chunk has at least 64 classes.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float64 if an input is, else float32. A mean over no samples is NaN, with
        gradients of 0. Accuracy is the same for logits up to 2e38 and class weights with norms from 1e-12 to 1e37.
        Shorter class weights count as zero. A larger logit gives NaN, as does a logit above 2e6 on tensor cores with a
        scale per sample. Norms in float64 may be up to 1e154; a longer row gives NaN.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes, devices or values. Labels on a CUDA device are checked there, and
            the next call reports them (in debug mode, the same call; see :func:`fused_margin.set_debug`).
        RuntimeError: for CUDA tensors in a build without CUDA kernels, and for second derivatives.

    Examples:
        >>> import torch
        >>> from fused_margin import Margin, functional as F
        >>> embeddings, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> loss = F.margin_cross_entropy(embeddings, weight, labels, Margin(m2=0.5), scale=4.0)
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-4 cos(0.5)))
        0.0581

        Every sample has a margin of its own:

        >>> margin = Margin(m2=torch.tensor([0.0, 0.5, 1.0]))
        >>> F.margin_cross_entropy(embeddings, weight, labels, margin, scale=4.0, reduction="none")
        tensor([0.0360, 0.0581, 0.2073])
    """
    # at least 0, because there may be more ranks than classes
    _checks.batch(embeddings, weight, labels, at_least=1 if shard is None else 0)
    _checks.instance("margin", margin, Margin)
    _checks.scale(scale)
    _checks.number("exclusive_weight", exclusive_weight, 0.0)
    _checks.cross_entropy_options(reduction, exclusive_weight, ignore_index, label_smoothing, workspace_mb)
    _checks.sub_centers(sub_centers, weight, exclusive_weight, label_smoothing)
    classes = _checks.shard(shard, weight, sub_centers, label_smoothing)
    _checks.per_class("class_weight", class_weight, weight, classes)
    if exclusive_weight > 0:
        if classes < 2:
            _checks.class_weights(weight, at_least=2)
        _checks.nearest(nearest, weight, shard)
    return _cross_entropy.margin_cross_entropy(
        embeddings, weight, labels, margin, scale, exclusive_weight=exclusive_weight, class_weight=class_weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, sub_centers=sub_centers,
        hard_negatives=hard_negatives, nearest=nearest, shard=shard,
        sample_rate=1.0 if shard is None else shard.sample_rate, sparse=True, workspace_mb=workspace_mb,
    )  # fmt: skip


def linear_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    margin: Margin | None = None,
    *,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shard: Shard | None = None,
    workspace_mb: float = 256,
) -> Tensor:
    """Cross-entropy over inner products: plain softmax, or L-softmax with a margin.

    The logits are ``z_ij = x_i . w_j + b_j``. The loss is that of ``torch.nn.functional.linear`` and
    ``torch.nn.functional.cross_entropy``, with the (N, C) logits computed in chunks. A margin replaces the target's
    logit by ``|x_i| |w_y| psi(theta_i) + b_y`` (L-softmax, arXiv:1612.02295, eq. 4).

    Args:
        embeddings: (N, D), float32, float64, float16 or bfloat16, any strides. They are not normalized.
        weight: (C, D) class weights on the same device; the dtype may differ.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        bias: (C,) or None.
        margin: the margin on the target, or None. Not supported with label smoothing.
        class_weight, reduction, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        shard: as in :func:`margin_cross_entropy`; ``bias`` has the same classes as ``weight``. If only a share of the
            classes is drawn, the gradient of ``weight`` is sparse; the gradient of ``bias`` is dense, and 0 for the
            other classes.
        workspace_mb: as in :func:`margin_cross_entropy`.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float64 if an input is, else float32. A mean over no samples is NaN, with
        gradients of 0. Logits may be as large as float32 allows; larger logits give inf or NaN.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`margin_cross_entropy`.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> embeddings, weight, labels = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> loss = F.linear_cross_entropy(embeddings, weight, labels, bias=torch.zeros(3))
        >>> round(loss.item(), 4)  # log(1 + 2 exp(-1))
        0.5514
    """
    _checks.batch(embeddings, weight, labels, at_least=1 if shard is None else 0)
    _checks.cross_entropy_options(reduction, 0.0, ignore_index, label_smoothing, workspace_mb)
    classes = _checks.shard(shard, weight, 1, label_smoothing)
    _checks.per_class("class_weight", class_weight, weight, classes)
    _checks.per_class("bias", bias, weight, len(weight))
    if margin is not None:
        _checks.instance("margin", margin, Margin)
        _checks.absent("a margin", label_smoothing=label_smoothing)
    return _cross_entropy.linear_cross_entropy(
        embeddings, weight, labels, bias, margin, class_weight=class_weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, shard=shard,
        sample_rate=1.0 if shard is None else shard.sample_rate, sparse=True, workspace_mb=workspace_mb,
    )  # fmt: skip


def cosine_logsumexp(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor | None = 64.0,
    *,
    workspace_mb: float = 256,
) -> tuple[Tensor, Tensor]:
    """The logsumexp and the target cosines of N x C cosines, for a margin of your own on (N,) tensors.

    Both are differentiable, so that autograd differentiates the margin.

    Args:
        embeddings, weight, scale, workspace_mb: as in :func:`margin_cross_entropy`.
        labels: (N,) integers in [0, C). No label is ignored.

    Returns:
        ``(negative_logsumexp, target_cosine)``, each (N,): ``log sum_{j != y_i} exp(scale_i * cos_ij)`` (-inf with a
        single class) and ``cos_{i, y_i}``. The loss for a target logit z is
        ``torch.nn.functional.softplus(negative_logsumexp - z)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`margin_cross_entropy`.

    Examples:
        ArcFace, with the margin in Python:

        >>> import torch
        >>> from fused_margin import Margin, functional as F
        >>> weight, labels = torch.eye(3), torch.arange(3)
        >>> embeddings = torch.eye(3) + 0.1
        >>> others, cosine = F.cosine_logsumexp(embeddings, weight, labels, scale=4.0)
        >>> target = 4.0 * torch.cos(torch.acos(cosine) + 0.5)
        >>> loss = torch.nn.functional.softplus(others - target).mean()
        >>> built_in = F.margin_cross_entropy(embeddings, weight, labels, Margin(m2=0.5), scale=4.0)
        >>> torch.allclose(loss, built_in)
        True
    """
    _checks.batch(embeddings, weight, labels)
    _checks.scale(scale)
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    sample_scale, scale_value = _cross_entropy.scales_of(scale, embeddings)
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB), select_backend(embeddings, weight, scale_value),
        labels.to(torch.int64).contiguous(), sample_scale, scale_value, num_classes=len(weight),
    )  # fmt: skip
    nothing_ignored = torch.iinfo(torch.int64).min
    output = library.run_forward(inputs, False, nothing_ignored)
    logsumexp = output.largest_logit + output.relative_logsumexp
    dtype = compute_dtype(embeddings, weight)
    return logsumexp.to(dtype), output.target_cosine.to(dtype)

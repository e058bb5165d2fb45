"""Functional interface: softmax losses with and without margins, and the exclusive term, over (C, D) class weights."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.backends.select import select_backend
from fused_margin._ops.inputs import MIB, PORTABLE, LossInputs
from fused_margin.distributed import Shard
from fused_margin.margins import BEYOND_PI, FilteredNegatives, HardNegatives, Margin
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

    With unit-length rows x and w, ``cos_ij = x_i . w_j`` and ``theta_i`` the angle to the sample's own class::

        z_i    = scale_i * psi(theta_i)                                  (psi: fused_margin.Margin)
        loss_i = log(exp z_i + sum_{j != y_i} exp(scale_i * cos_ij)) - z_i
        result = reduce(loss_i) + exclusive_weight / C * sum_j max_{k != j} w_j . w_k

    (ArcFace, arXiv:1801.07698, eq. 4; exclusive term: RegularFace, CVPR 2019, eq. 8.) Neither the (N, C)
    logits nor the (C, C) cosines are ever whole; scratch stays within ``workspace_mb`` plus O(N * D + C).
    A row shorter than 1e-12 counts as zero: its cosines and gradients are 0.

    Args:
        embeddings: (N, D), float32, float64, float16 or bfloat16, any strides.
        weight: (C, D) class weights, same device; dtype may differ. Need not be normalised.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: the margin; its numbers may be (N,) tensors.
        scale: positive number, or an (N,) tensor of non-negative numbers (differentiable), or None for the
            embedding's norm, as SphereFace does.
        exclusive_weight: lambda of the exclusive term; its gradient is written with the others'.
        class_weight, reduction, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        sub_centers: S rows of weight for every class, (C * S, D), class by class; the cosine to a class is that
            to the nearest of them (sub-center ArcFace, ECCV 2020, eq. 3). Neither with the exclusive term nor
            with label smoothing.
        hard_negatives: what becomes of near classes: they weigh more (CurricularFace), or count as
            orthogonal (InsightFace's filtering). Not with label smoothing.
        nearest: every class's nearest other, for the exclusive term, where they are known already (as
            :class:`fused_margin.ExclusiveRegularizer` knows them); None finds them.
        shard: which of the classes ``weight`` holds, if they are divided among ranks. Embeddings and labels are then
            each rank's own, and may differ in number; labels count over all classes, and so does ``class_weight``,
            which every rank has whole. Every rank gets the loss of all samples (its own with ``reduction="none"``),
            and in the backward the gradients of that for its embeddings and its classes.
        workspace_mb: bound on scratch memory in MiB. Exponentials that fit in it are kept for the
            backward, the others are computed again. At least 64 classes are always taken at a time.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float64 if an input is, else float32. A mean over no sample is NaN, with
        gradients of 0. Logits up to 2e38 and class weights of norms from 1e-12 to 1e37 are computed as accurately as
        smaller ones; shorter class weights count as zero, and a larger logit gives NaN. So does, on tensor cores, one
        above 2e6 where each sample has its own scale. In float64 norms may reach 1e154; a longer row gives
        NaN.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes, devices or values. Labels on a CUDA device are
            checked there and reported by the next call (``fused_margin.set_debug(True)``: at once).
        RuntimeError: for CUDA tensors in a build without CUDA kernels, and for second derivatives.
    """
    # there may be more ranks than classes
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
    return unchecked_margin_cross_entropy(
        embeddings, weight, labels, margin, scale, exclusive_weight=exclusive_weight, class_weight=class_weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, sub_centers=sub_centers,
        hard_negatives=hard_negatives, nearest=nearest, shard=shard,
        sample_rate=1.0 if shard is None else shard.sample_rate, sparse=True, workspace_mb=workspace_mb,
    )  # fmt: skip


def unchecked_margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    scale: float | Tensor | None,
    *,
    exclusive_weight: float,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    sub_centers: int,
    hard_negatives: HardNegatives | FilteredNegatives | None,
    nearest: NearestClass | None,
    shard: Shard | None,
    sample_rate: float,
    sparse: bool,
    workspace_mb: float,
) -> Tensor:
    """:func:`margin_cross_entropy` of arguments that were checked before: the modules check theirs when they are set.

    Args:
        sample_rate: share of the classes that take part.
        sparse: whether the gradient of weight is sparse where ``sample_rate`` is below 1.
    """
    classes, group = (weight.shape[0] // sub_centers, "") if shard is None else _divided(embeddings, weight, shard)
    scales, scale_value = _scales(scale, embeddings)
    threshold = strength = None
    if hard_negatives is not None:
        threshold, strength = _hard_negatives(hard_negatives, embeddings, scale, label_smoothing)
    smooth, exclusive = label_smoothing > 0, exclusive_weight > 0
    if class_weight is not None:
        class_weight = class_weight.detach().to(torch.float64).contiguous()
    portable = sub_centers > 1 or threshold is not None
    fused = exclusive and sample_rate >= 1  # the exclusive term is over all classes
    known = nearest if fused and nearest is not None else (None, None)
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB),
        PORTABLE if portable else select_backend(embeddings, weight, scale_value), labels.to(torch.int64).contiguous(),
        scales, scale_value, _local(class_weight, shard) if smooth else None, fused, *known, sub_centers, threshold,
        strength, group=group, num_classes=classes, sample_rate=sample_rate, sparse_gradient=sparse,
    )  # fmt: skip
    output = library.run_forward(inputs, smooth, ignore_index)
    loss, row_weight = _margin_loss(
        inputs, margin, output.largest_logit + output.relative_logsumexp, output.target_cosine,
        output.uniform_cosine if smooth else None, class_weight, label_smoothing, ignore_index, classes,
    )  # fmt: skip
    cosine = output.nearest_cosine if fused else None
    result = _reduce(loss, row_weight, reduction, shard, cosine, exclusive_weight)
    if exclusive and not fused:
        term = exclusive_regularization(weight, nearest=nearest, shard=shard, workspace_mb=workspace_mb)
        result = result + exclusive_weight * term
    return result.to(inputs.compute)


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
    """Cross-entropy over inner products, ``z_ij = x_i . w_j + b_j``: plain softmax, and L-softmax with a margin.

    What ``torch.nn.functional.linear_cross_entropy`` computes, with nothing of size N x C ever whole. A margin
    replaces the target's logit by ``|x_i| |w_y| psi(theta_i) + b_y`` (L-softmax, arXiv:1612.02295, eq. 4).

    Args:
        embeddings: (N, D), float32, float64, float16 or bfloat16, any strides; not normalised.
        weight: (C, D), same device; dtype may differ.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        bias: (C,) or None.
        margin: of the target, or None. Not with label smoothing.
        class_weight, reduction, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        shard: as in :func:`margin_cross_entropy`; ``bias`` is then of the same classes as ``weight``. Where a share of
            the classes is drawn, the gradient of ``weight`` is sparse, that of ``bias`` dense, 0 for the others.
        workspace_mb: as in :func:`margin_cross_entropy`.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float64 if an input is, else float32. A mean over no sample is NaN, with
        gradients of 0. Logits may be as large as float32 allows; beyond, the loss is inf or NaN.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`margin_cross_entropy`.
    """
    _checks.batch(embeddings, weight, labels, at_least=1 if shard is None else 0)
    _checks.cross_entropy_options(reduction, 0.0, ignore_index, label_smoothing, workspace_mb)
    classes = _checks.shard(shard, weight, 1, label_smoothing)
    _checks.per_class("class_weight", class_weight, weight, classes)
    _checks.per_class("bias", bias, weight, len(weight))
    if margin is not None:
        _checks.instance("margin", margin, Margin)
        _checks.absent("a margin", label_smoothing=label_smoothing)
    return unchecked_linear_cross_entropy(
        embeddings, weight, labels, bias, margin, class_weight=class_weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, shard=shard,
        sample_rate=1.0 if shard is None else shard.sample_rate, sparse=True, workspace_mb=workspace_mb,
    )  # fmt: skip


def unchecked_linear_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    margin: Margin | None,
    *,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    shard: Shard | None,
    sample_rate: float,
    sparse: bool,
    workspace_mb: float,
) -> Tensor:
    """:func:`linear_cross_entropy` of arguments that were checked before; see :func:`unchecked_margin_cross_entropy`."""
    classes, group = (weight.shape[0], "") if shard is None else _divided(embeddings, weight, shard)
    labels, smooth = labels.to(torch.int64).contiguous(), label_smoothing > 0
    if class_weight is not None:
        class_weight = class_weight.detach().to(torch.float64).contiguous()
    own_class_weight = _local(class_weight, shard)
    # Once, before all its uses: the parts of its gradient nearly cancel, and rounding each to a half would remain.
    bias = None if bias is None else bias.double()
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB), PORTABLE, labels, inner_product=True, bias=bias,
        class_weight=own_class_weight if smooth else None, need_length=margin is not None, group=group,
        num_classes=classes, sample_rate=sample_rate, sparse_gradient=sparse,
    )  # fmt: skip
    output = library.run_forward(inputs, smooth, ignore_index)
    logsumexp = output.largest_logit + output.relative_logsumexp
    target_bias = 0.0 if bias is None else output.target_bias
    if margin is not None:
        length = (_norm(embeddings) * output.target_length).contiguous()
        cosine = torch.where(length > 0, output.target_cosine / torch.where(length > 0, length, 1.0), 0.0)
        # Subtracted here instead of added to the target's logit.
        loss, row_weight = _margin_loss(
            inputs, margin, logsumexp - target_bias, cosine, None, class_weight, 0.0, ignore_index, classes, length
        )
        return _reduce(loss, row_weight, reduction, shard).to(inputs.compute)
    target = output.target_cosine + target_bias
    nll = F.softplus(logsumexp - target, threshold=40.0)  # log(1 + exp(.)), exact in float64
    own = labels.clamp(0, classes - 1)  # an ignored sample's is not used
    row_weight = torch.ones_like(nll) if class_weight is None else class_weight[own]
    loss = row_weight * nll
    if smooth:
        uniform, weights = output.uniform_cosine, classes if class_weight is None else class_weight.sum()
        if bias is not None:
            biases = bias.sum() if class_weight is None else own_class_weight.dot(bias)
            if shard is not None:
                biases = library.all_reduce_backward(library.all_reduce_forward(biases, group), group)
            uniform = uniform + biases
        smoothed = ((target + nll) * weights - uniform) / classes
        loss = torch.lerp(loss, smoothed, label_smoothing * torch.ones_like(loss))
    counts = labels != ignore_index
    loss, row_weight = torch.where(counts, loss, 0.0), torch.where(counts, row_weight, 0.0)
    return _reduce(loss, row_weight, reduction, shard).to(inputs.compute)


def cosine_logsumexp(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor | None = 64.0,
    *,
    workspace_mb: float = 256,
) -> tuple[Tensor, Tensor]:
    """The logsumexp and the target cosines of N x C cosines, differentiable: write your own margin on (N,) tensors.

    Args:
        embeddings, weight, labels, scale, workspace_mb: as in :func:`margin_cross_entropy`; no label is ignored.

    Returns:
        ``(negative_logsumexp, target_cosine)``, each (N,): ``log sum_{j != y_i} exp(scale_i * cos_ij)`` (-inf if
        there is one class only) and ``cos_{i, y_i}``. The loss of a target logit z is
        ``torch.nn.functional.softplus(negative_logsumexp - z)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`margin_cross_entropy`.
    """
    _checks.batch(embeddings, weight, labels)
    _checks.scale(scale)
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    scales, scale_value = _scales(scale, embeddings)
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB), select_backend(embeddings, weight, scale_value),
        labels.to(torch.int64).contiguous(), scales, scale_value, num_classes=len(weight),
    )  # fmt: skip
    nothing_ignored = torch.iinfo(torch.int64).min
    output = library.run_forward(inputs, False, nothing_ignored)
    logsumexp = output.largest_logit + output.relative_logsumexp
    return logsumexp.to(inputs.compute), output.target_cosine.to(inputs.compute)


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; NaN where nothing counts, with a gradient of 0, as in torch.nn.functional.cross_entropy."""
    empty = count == 0
    return torch.where(empty, math.nan, total / count.masked_fill(empty, 1))


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _divided(embeddings: Tensor, weight: Tensor, shard: Shard) -> tuple[int, str]:
    """C over all ranks, and the name of their group."""
    _checks.not_meta(weight)
    if not torch.compiler.is_compiling():
        library.refuse_transforms(embeddings, weight)
    return shard.num_classes, shard.name


def _local(class_weight: Tensor | None, shard: Shard | None) -> Tensor | None:
    """The class weights of this rank's classes."""
    return class_weight if shard is None or class_weight is None else shard.local_part(class_weight)


def _scales(scale: float | Tensor | None, embeddings: Tensor) -> tuple[Tensor | None, float]:
    """Per-sample scales (N,) float64, or None and the one number."""
    if scale is None:
        norm = _norm(embeddings)
        return torch.where(norm.isnan(), 0.0, norm), 0.0  # the loss of that row is NaN by its cosines
    if isinstance(scale, Tensor):
        return _checks.per_sample("scale", scale, embeddings), 0.0
    return None, float(scale)


def _hard_negatives(
    value: HardNegatives | FilteredNegatives,
    embeddings: Tensor,
    scale: float | Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Threshold (N,) and strength (1,), float64; no strength for a filter, and neither where nothing changes."""
    if not isinstance(value, (HardNegatives, FilteredNegatives)):
        raise TypeError(
            "hard_negatives: expected a fused_margin.margins.HardNegatives or FilteredNegatives, got "
            f"{type(value).__name__}"
        )
    _checks.absent("hard_negatives", label_smoothing=label_smoothing)
    if isinstance(value, FilteredNegatives):
        _checks.number("hard_negatives.threshold", value.threshold, 0.0, 1.0, open_low=True)
        if value.threshold >= 1:  # torch.compile makes a constant of a number that is compared by ==
            return None, None  # only rounding is above it
        # a product, because torch.compile makes a constant of the value that a tensor is filled with
        return value.threshold * embeddings.new_ones(embeddings.shape[:1], dtype=torch.float64), None
    fixed = isinstance(scale, Tensor) and scale.dim() == 0 and not scale.requires_grad
    if not (_checks.is_number(scale) or fixed):
        raise TypeError(
            f"scale: expected a number with HardNegatives, or a 0-d tensor without gradient, got {_checks.kind(scale)}"
        )
    if not isinstance(value.threshold, Tensor) or value.threshold.dim() != 1:
        raise TypeError(
            f"hard_negatives.threshold: expected a tensor of shape (N,), got {_checks.kind(value.threshold)}"
        )
    threshold = _checks.per_sample("hard_negatives.threshold", value.threshold.detach(), embeddings)
    if isinstance(value.strength, Tensor):
        if value.strength.numel() != 1:
            raise ValueError(f"hard_negatives.strength: expected one element, got {tuple(value.strength.shape)}")
        _checks.same_device("hard_negatives.strength", value.strength, embeddings)
        return threshold, value.strength.detach().to(torch.float64).reshape(1)
    _checks.number("hard_negatives.strength", value.strength, -math.inf)
    return threshold, threshold.new_full((1,), value.strength)


def _margin_loss(
    inputs: LossInputs,
    margin: Margin,
    logsumexp: Tensor,
    target_cosine: Tensor,
    uniform_cosine: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    classes: int,
    length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses (N,) float64, and the class weight of each label, 0 where ignored.

    Args:
        logsumexp: (N,) float64 over the classes other than the target.
        length: (N,) float64 scale of the samples' logits, in place of the inputs'.
    """
    numbers = {"m1": margin.m1, "m2": margin.m2, "m3": margin.m3, "annealing": margin.annealing}
    if torch.compiler.is_compiling():
        # Numbers would be constants of the graph, with one compilation for every value. Comparing one with its default
        # makes a constant of it too, and for good.
        ones = torch.ones(inputs.labels.shape[0], dtype=torch.float64, device=inputs.labels.device)
        numbers = {name: v if isinstance(v, Tensor) else v * ones for name, v in numbers.items()}
    per_sample = [
        _checks.per_sample(f"margin.{name}", value, inputs.embeddings) if isinstance(value, Tensor) else None
        for name, value in numbers.items()
    ]
    values = [0.0 if isinstance(value, Tensor) else float(value) for value in numbers.values()]
    loss, row_weight, _ = library.margin_rows(
        logsumexp, target_cosine, uniform_cosine, inputs.labels, class_weight,
        None if class_weight is None or uniform_cosine is None else class_weight.sum(),
        inputs.scale if length is None else length, *per_sample, [inputs.scale_value, *values],
        BEYOND_PI.index(margin.beyond_pi), margin.easy, margin.gradient == "straight_through",
        math.sqrt(torch.finfo(inputs.compute).eps),
        None if uniform_cosine is None else label_smoothing * torch.ones((), dtype=torch.float64, device="cpu"),
        classes, ignore_index,
    )  # fmt: skip
    return loss, row_weight


def _reduce(
    loss: Tensor,
    row_weight: Tensor,
    reduction: str,
    shard: Shard | None,
    nearest_cosine: Tensor | None = None,
    exclusive_weight: float = 0.0,
) -> Tensor:
    """The reduced loss, over all ranks' samples, plus the exclusive term."""
    if reduction == "none":
        return loss
    if shard is None:
        total, count = loss.sum(), row_weight.sum()
        term = None if nearest_cosine is None else nearest_cosine.mean(dtype=torch.float64)
    else:
        # One message: torch.compile could order several differently on each rank.
        sums = [loss.sum(), row_weight.detach().sum()]
        if nearest_cosine is not None:
            sums.append(nearest_cosine.sum(dtype=torch.float64) / shard.num_classes)
        total, count, *terms = library.all_reduce_forward(torch.stack(sums), shard.name).unbind()
        term = terms[0] if terms else None
    result = total if reduction == "sum" else mean_over(total, count)
    return result if term is None else result + exclusive_weight * term

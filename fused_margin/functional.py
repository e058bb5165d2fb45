"""Functional interface: softmax losses with and without margins, and the exclusive term, over (C, D) class weights."""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.backends.select import PORTABLE, products_of
from fused_margin._ops.inputs import Problem, Sweep, workspace_bytes
from fused_margin._ops.rows import select_rows
from fused_margin._ops.sharded import run_sharded_sweep
from fused_margin._reductions import mean_over
from fused_margin.distributed import Shard, Shared, Total
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
    _checks.batch(
        embeddings, weight, labels, at_least=1 if shard is None else 0
    )  # there may be more ranks than classes
    _checks.margin(margin)
    _checks.scale(scale)
    _checks.number("exclusive_weight", exclusive_weight, 0.0)
    _checks.cross_entropy_options(reduction, exclusive_weight, ignore_index, label_smoothing, workspace_mb)
    _checks.sub_centers(sub_centers, weight, exclusive_weight, label_smoothing)
    classes = _checks.shard(shard, weight, sub_centers, label_smoothing)
    _checks.per_class("class_weight", class_weight, weight, classes)
    threshold, strength = _checks.hard_negatives(hard_negatives, embeddings, scale, label_smoothing)
    exclusive, smooth = exclusive_weight > 0, label_smoothing > 0
    if exclusive and classes < 2:
        _checks.class_weights(weight, at_least=2)

    labels, class_weight = labels.to(torch.int64).contiguous(), _double(class_weight)
    scales, scale_value = _scales(scale, embeddings)
    portable = sub_centers > 1 or threshold is not None
    products = PORTABLE if portable else products_of(embeddings, weight, scale_value)
    known = _checks.nearest(nearest, weight, shard) if exclusive else (None, None)
    own_class_weight = class_weight if shard is None or class_weight is None else shard.part_of(class_weight)
    problem = Problem(
        embeddings, weight, workspace_bytes(workspace_mb), products, labels,
        scales, scale_value, own_class_weight if smooth else None, exclusive and shard is None, *known,
        sub_centers, threshold, strength,
    )  # fmt: skip
    if shard is None:
        found = _sweep(problem, smooth, ignore_index)
    else:
        found = run_sharded_sweep(problem, smooth, ignore_index, shard)
    loss = _margin_loss(
        problem, margin, found.negative_logsumexp, found.target_cosine, found.uniform_cosine if smooth else None,
        class_weight, label_smoothing, ignore_index, reduction, classes, shard,
    )  # fmt: skip
    if exclusive and shard is None:
        loss = loss + exclusive_weight * found.nearest_cosine.mean(dtype=torch.float64)
    elif exclusive:
        loss = loss + exclusive_weight * exclusive_regularization(
            weight, nearest=nearest, shard=shard, workspace_mb=workspace_mb
        )
    return loss.to(problem.compute)


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
        _checks.margin(margin)
        _checks.absent("a margin", label_smoothing=label_smoothing)
    labels, class_weight, smooth = labels.to(torch.int64).contiguous(), _double(class_weight), label_smoothing > 0
    own_class_weight = class_weight if shard is None or class_weight is None else shard.part_of(class_weight)
    # Once, before all its uses: the parts of its gradient nearly cancel, and rounding each to a half would remain.
    bias = None if bias is None else bias.double()
    problem = Problem(
        embeddings, weight, workspace_bytes(workspace_mb), PORTABLE, labels, inner_product=True, bias=bias,
        class_weight=own_class_weight if smooth else None,
    )  # fmt: skip
    own = labels.clamp(0, classes - 1)  # an ignored sample's is not used
    if shard is None:
        found = _sweep(problem, smooth, ignore_index)
        own_bias = 0.0 if bias is None else bias[own]
        own_length = None if margin is None else _norm(select_rows(weight, own, problem.compute))
    else:
        found = run_sharded_sweep(problem, smooth, ignore_index, shard, length=margin is not None)
        own_bias, own_length = 0.0 if bias is None else found.target_bias, found.target_length
    if margin is not None:
        length = (_norm(embeddings) * own_length).contiguous()
        cosine = torch.where(length > 0, found.target_cosine / torch.where(length > 0, length, 1.0), 0.0)
        problem = replace(problem, scale=length)
        nlse = found.negative_logsumexp - own_bias  # in the place of adding it to the target's logit
        loss = _margin_loss(
            problem, margin, nlse, cosine, None, class_weight, 0.0, ignore_index, reduction, classes, shard
        )
        return loss.to(problem.compute)
    target = found.target_cosine + own_bias
    nll = F.softplus(found.negative_logsumexp - target, threshold=40.0)  # log(1 + exp(.)), exact in float64
    row_weight = torch.ones_like(nll) if class_weight is None else class_weight[own]
    loss = row_weight * nll
    if smooth:
        uniform, weights = found.uniform_cosine, classes if class_weight is None else class_weight.sum()
        if bias is not None:
            biases = bias.sum() if class_weight is None else own_class_weight.dot(bias)
            uniform = uniform + (biases if shard is None else Shared.apply(shard, Total.apply(shard, biases)))
        smoothed = ((target + nll) * weights - uniform) / classes
        loss = torch.lerp(loss, smoothed, label_smoothing * torch.ones_like(loss))
    counts = labels != ignore_index
    loss, row_weight = torch.where(counts, loss, 0.0), torch.where(counts, row_weight, 0.0)
    return _reduce(loss, row_weight, reduction, shard).to(problem.compute)


def cosine_logsumexp(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor | None = 64.0,
    *,
    workspace_mb: float = 256,
) -> tuple[Tensor, Tensor]:
    """What any margin loss needs of the N x C cosines, differentiable: write your own margin on (N,) tensors.

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
    problem = Problem(
        embeddings, weight, workspace_bytes(workspace_mb), products_of(embeddings, weight, scale_value),
        labels.to(torch.int64).contiguous(), scales, scale_value,
    )  # fmt: skip
    nothing_ignored = torch.iinfo(torch.int64).min
    found = _sweep(problem, False, nothing_ignored)
    return found.negative_logsumexp.to(problem.compute), found.target_cosine.to(problem.compute)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _double(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.detach().to(torch.float64).contiguous()


def _scales(scale: float | Tensor | None, embeddings: Tensor) -> tuple[Tensor | None, float]:
    """Per-sample scales (N,) float64, or None and the one number."""
    if scale is None:
        norm = _norm(embeddings)
        return torch.where(norm.isnan(), 0.0, norm), 0.0  # the loss of that row is NaN by its cosines
    return _checks.per_sample("scale", scale, embeddings), 0.0 if isinstance(scale, Tensor) else float(scale)


def _sweep(problem: Problem, uniform: bool, ignore_index: int) -> Sweep:
    differentiable = (problem.embeddings, problem.weight, problem.bias, problem.scale)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    return library.run_sweep(problem, uniform, ignore_index, keep)


def _margin_loss(
    problem: Problem,
    margin: Margin,
    negative_logsumexp: Tensor,
    target_cosine: Tensor,
    uniform_cosine: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    classes: int,
    shard: Shard | None = None,
) -> Tensor:
    """The loss, reduced, float64, from what a sweep has found."""
    numbers = {"m1": margin.m1, "m2": margin.m2, "m3": margin.m3, "annealing": margin.annealing}
    if torch.compiler.is_compiling():
        # Numbers would be constants of the graph, with one compilation for every value. Comparing one with its default
        # makes a constant of it too, and for good.
        numbers = {name: _variable(value, problem) for name, value in numbers.items()}
    per_sample = [_checks.per_sample(f"margin.{name}", value, problem.embeddings) for name, value in numbers.items()]
    values = [0.0 if isinstance(value, Tensor) else float(value) for value in numbers.values()]
    loss, row_weight, _ = library.margin_rows(
        negative_logsumexp, target_cosine, uniform_cosine, problem.labels, class_weight,
        None if class_weight is None or uniform_cosine is None else class_weight.sum(),
        problem.scale, *per_sample, [problem.scale_value, *values], BEYOND_PI.index(margin.beyond_pi), margin.easy,
        margin.gradient == "straight_through", math.sqrt(torch.finfo(problem.compute).eps),
        None if uniform_cosine is None else label_smoothing * torch.ones((), dtype=torch.float64, device="cpu"),
        classes, ignore_index,
    )  # fmt: skip
    return _reduce(loss, row_weight, reduction, shard)


def _variable(value: float | Tensor, problem: Problem) -> Tensor:
    """A number as a tensor of all samples."""
    if isinstance(value, Tensor):
        return value
    return value * torch.ones(problem.samples, dtype=torch.float64, device=problem.labels.device)


def _reduce(loss: Tensor, row_weight: Tensor, reduction: str, shard: Shard | None = None) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum() if shard is None else Total.apply(shard, loss.sum())
    if reduction == "sum":
        return total
    return mean_over(total, row_weight.sum() if shard is None else shard.add_up(row_weight.detach().sum()))

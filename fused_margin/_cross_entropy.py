"""The cross-entropies of this package, of checked arguments: computations on (N,) tensors around one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_margin import _checks
from fused_margin._ops import collectives, library
from fused_margin._ops.backends.select import select_backend
from fused_margin._ops.inputs import MIB, PORTABLE, LossInputs, compute_dtype
from fused_margin._ops.margin_rows import margin_rows
from fused_margin._ops.row_update import WeightStepper
from fused_margin.distributed import Shard
from fused_margin.margins import BEYOND_PI, FilteredNegatives, HardNegatives, Margin
from fused_margin.nearest import NearestClass, exclusive_regularization


def margin_cross_entropy(
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
    stepper: WeightStepper | None = None,
) -> Tensor:
    """:func:`fused_margin.functional.margin_cross_entropy` without its checks.

    Args:
        sample_rate: share of the classes that take part.
        sparse: whether the gradient of weight is sparse if ``sample_rate`` is below 1.
        stepper: steps ``weight`` in the backward.
    """
    classes, group = (
        (weight.shape[0] // sub_centers, "") if shard is None else _check_divided(embeddings, weight, shard)
    )
    sample_scale, scale_value = (None, scale) if isinstance(scale, float) else scales_of(scale, embeddings)
    labels = labels.to(torch.int64).contiguous()
    threshold = strength = None
    if hard_negatives is not None:
        threshold, strength = _hard_negatives(hard_negatives, embeddings, scale, label_smoothing)
    smooth, exclusive = label_smoothing > 0, exclusive_weight > 0
    if class_weight is not None:
        class_weight = class_weight.detach().to(torch.float64).contiguous()
    needs_portable = sub_centers > 1 or threshold is not None
    exclusive_in_op = exclusive and sample_rate >= 1  # the exclusive term is over all classes
    known_cosine, known_index = nearest if exclusive_in_op and nearest is not None else (None, None)
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB),
        PORTABLE if needs_portable else select_backend(embeddings, weight, scale_value), labels, sample_scale,
        scale_value, _local_class_weight(class_weight, shard) if smooth else None, exclusive_in_op, known_cosine,
        known_index, sub_centers, threshold, strength, group=group, num_classes=classes, sample_rate=sample_rate,
        sparse_gradient=sparse,
    )  # fmt: skip
    output = library.run_forward(inputs, smooth, ignore_index, stepper)
    loss, row_weight = margin_losses(
        inputs, embeddings, labels, margin, output.largest_logit + output.relative_logsumexp, output.target_cosine,
        output.uniform_cosine if smooth else None, class_weight, label_smoothing, ignore_index, classes,
    )  # fmt: skip
    nearest_cosine = output.nearest_cosine if exclusive_in_op else None
    result = _reduce(loss, row_weight, reduction, shard, nearest_cosine, exclusive_weight)
    if exclusive and not exclusive_in_op:
        term = exclusive_regularization(weight, nearest=nearest, shard=shard, workspace_mb=workspace_mb)
        result = result + exclusive_weight * term
    return result.to(compute_dtype(embeddings, weight))


def linear_cross_entropy(
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
    stepper: WeightStepper | None = None,
) -> Tensor:
    """:func:`fused_margin.functional.linear_cross_entropy` without its checks; see :func:`margin_cross_entropy`."""
    classes, group = (weight.shape[0], "") if shard is None else _check_divided(embeddings, weight, shard)
    labels, smooth = labels.to(torch.int64).contiguous(), label_smoothing > 0
    if class_weight is not None:
        class_weight = class_weight.detach().to(torch.float64).contiguous()
    local_class_weight = _local_class_weight(class_weight, shard)
    # Converted once, before all uses: the parts of its gradient nearly cancel, and rounding each of them to half
    # precision would leave an error.
    bias = None if bias is None else bias.double()
    inputs = LossInputs(
        embeddings, weight, int(workspace_mb * MIB), PORTABLE, labels, inner_product=True, bias=bias,
        class_weight=local_class_weight if smooth else None, need_length=margin is not None, group=group,
        num_classes=classes, sample_rate=sample_rate, sparse_gradient=sparse,
    )  # fmt: skip
    output = library.run_forward(inputs, smooth, ignore_index, stepper)
    logsumexp = output.largest_logit + output.relative_logsumexp
    target_bias = 0.0 if bias is None else output.target_bias
    if margin is not None:
        length = (_norm(embeddings) * output.target_length).contiguous()
        cosine = torch.where(length > 0, output.target_cosine / torch.where(length > 0, length, 1.0), 0.0)
        # The bias is subtracted from the logsumexp instead of added to the target's logit.
        loss, row_weight = margin_losses(
            inputs, embeddings, labels, margin, logsumexp - target_bias, cosine, None, class_weight, 0.0, ignore_index,
            classes, length,
        )  # fmt: skip
        return _reduce(loss, row_weight, reduction, shard).to(compute_dtype(embeddings, weight))
    target = output.target_cosine + target_bias
    nll = F.softplus(logsumexp - target, threshold=40.0)  # log(1 + exp(.)), exact in float64
    own = labels.clamp(0, classes - 1)  # valid indices; the values of ignored samples are not used
    row_weight = torch.ones_like(nll) if class_weight is None else class_weight[own]
    loss = row_weight * nll
    if smooth:
        uniform, weights = output.uniform_cosine, classes if class_weight is None else class_weight.sum()
        if bias is not None:
            biases = bias.sum() if local_class_weight is None else local_class_weight.dot(bias)
            if shard is not None:
                biases = collectives.all_reduce_backward(collectives.all_reduce_forward(biases, group), group)
            uniform = uniform + biases
        smoothed = ((target + nll) * weights - uniform) / classes
        loss = torch.lerp(loss, smoothed, label_smoothing * torch.ones_like(loss))
    valid = labels != ignore_index
    loss, row_weight = torch.where(valid, loss, 0.0), torch.where(valid, row_weight, 0.0)
    return _reduce(loss, row_weight, reduction, shard).to(compute_dtype(embeddings, weight))


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``; for a count of 0, NaN with a gradient of 0, as in torch.nn.functional.cross_entropy."""
    empty = count == 0
    return torch.where(empty, math.nan, total / count.masked_fill(empty, 1))


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _check_divided(embeddings: Tensor, weight: Tensor, shard: Shard) -> tuple[int, str]:
    """C over all ranks, and the name of the group."""
    _checks.not_meta(weight)
    if not torch.compiler.is_compiling():
        library.refuse_transforms(embeddings, weight)
    return shard.num_classes, shard.name


def _local_class_weight(class_weight: Tensor | None, shard: Shard | None) -> Tensor | None:
    """The class weights of this rank's classes."""
    return class_weight if shard is None or class_weight is None else shard.local_part(class_weight)


def scales_of(scale: float | Tensor | None, embeddings: Tensor) -> tuple[Tensor | None, float]:
    """Per-sample scales (N,) float64 and 0, or None and one number for all samples."""
    if scale is None:
        norm = _norm(embeddings)
        return torch.where(norm.isnan(), 0.0, norm), 0.0  # a NaN embedding makes the loss NaN by its cosines
    if isinstance(scale, Tensor):
        return _checks.per_sample("scale", scale, embeddings), 0.0
    return None, float(scale)


def _hard_negatives(
    value: HardNegatives | FilteredNegatives,
    embeddings: Tensor,
    scale: float | Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Threshold (N,) and strength (1,), float64. A filter has no strength; a filter at 1 has neither."""
    if not isinstance(value, (HardNegatives, FilteredNegatives)):
        raise TypeError(
            "hard_negatives: expected a fused_margin.margins.HardNegatives or FilteredNegatives, got "
            f"{type(value).__name__}"
        )
    _checks.absent("hard_negatives", label_smoothing=label_smoothing)
    if isinstance(value, FilteredNegatives):
        _checks.number("hard_negatives.threshold", value.threshold, 0.0, 1.0, open_low=True)
        if value.threshold >= 1:  # not ==, which makes the number a constant under torch.compile
            return None, None  # a cosine above 1 is rounding
        # A product, because torch.compile makes a fill value a constant.
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


def margin_losses(
    inputs: LossInputs,
    embeddings: Tensor,
    labels: Tensor,
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
    """Losses (N,) float64, and the class weight (N,) of each label, 0 for ignored labels.

    Args:
        labels: (N,) int64.
        logsumexp: (N,) float64, of the logits of the classes other than the target.
        length: (N,) float64 scale of the samples' logits, instead of the scale of `inputs`.
    """
    numbers = {"m1": margin.m1, "m2": margin.m2, "m3": margin.m3, "annealing": margin.annealing}
    if torch.compiler.is_compiling():
        # Numbers would be constants of the graph, which would be compiled for every value. Comparing a number with its
        # default would make it a constant too.
        ones = torch.ones(labels.shape[0], dtype=torch.float64, device=labels.device)
        numbers = {name: v if isinstance(v, Tensor) else v * ones for name, v in numbers.items()}
    per_sample = [
        _checks.per_sample(f"margin.{name}", value, embeddings) if isinstance(value, Tensor) else None
        for name, value in numbers.items()
    ]
    values = [0.0 if isinstance(value, Tensor) else float(value) for value in numbers.values()]
    loss, row_weight, _ = margin_rows(
        logsumexp, target_cosine, uniform_cosine, labels, class_weight,
        None if class_weight is None or uniform_cosine is None else class_weight.sum(),
        inputs.sample_scale if length is None else length, *per_sample, [inputs.scale_value, *values],
        BEYOND_PI.index(margin.beyond_pi), margin.easy, margin.gradient == "straight_through",
        math.sqrt(torch.finfo(compute_dtype(embeddings, inputs.weight)).eps),
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
    """The loss reduced over the samples of all ranks, plus the exclusive term."""
    if reduction == "none":
        return loss
    if shard is None:
        total, count = loss.sum(), row_weight.sum()
        term = None if nearest_cosine is None else nearest_cosine.mean(dtype=torch.float64)
    else:
        # One all-reduce, because torch.compile could order several of them differently on each rank.
        sums = [loss.sum(), row_weight.detach().sum()]
        if nearest_cosine is not None:
            sums.append(nearest_cosine.sum(dtype=torch.float64) / shard.num_classes)
        total, count, *terms = collectives.all_reduce_forward(torch.stack(sums), shard.name).unbind()
        term = terms[0] if terms else None
    result = total if reduction == "sum" else mean_over(total, count)
    return result if term is None else result + exclusive_weight * term
